"""Images: sets of them, their files, where they come from, how a network wants them, what is wrong with them."""
