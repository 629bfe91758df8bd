"""Images: sets of them, their files, where they come from, how a network wants them, what is wrong with them.

- `codec`: one image to bytes and back.
- `columns`: columns of Parquet files as images and labels, or one line that says why they are none.
- `folders`: files below a folder, each once, with the reason why one cannot be read.
- `image_folder`: a folder of images, flat or with one folder for each class.
- `image_set`: images in pixel space with labels and further columns, in memory or on disk, of any number.
- `loaders`: images that a user's own loader gives, read once into a set.
- `manifest`: what an image set says about itself: `manifest.json`.
- `part_writer`: Parquet parts whose bytes depend on nothing but the images in them.
- `parts`: images in Parquet files: any of them on demand, few of them in memory.
- `pixels`: what callers hand over as images, labels and columns, brought into the form that is stored.
- `preprocess`: how a network wants its images: size, crop, mean, standard deviation.
- `quality`: what is suspicious about the images of a set, and what is said of their reading.
- `reading`: images decoded ahead in threads, and what is remembered of their reading.
- `rows`: where a set's images lie: in memory or in single files.
- `sampler_steps`: what a few images of a set looked like at every step of the sampler.
- `scan`: statistics and defects of images, gathered one image after another.
- `seed_pairs`: images of two sets that were drawn from the same noise.
- `sources`: images from where people keep them: folders, Parquet files, `datasets`, the package itself.
- `store`: writing an image set while it is being made, so that a killed run continues with the parts that are missing.
- `targets`: what a network should have answered: class labels, masks, boxes.
"""
