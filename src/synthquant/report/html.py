"""Write one self-contained HTML page about one or several run folders.

The page is made from the files of the run folders alone: `run.json` (a `RunRecord`), `recipe.yaml`,
`model/quant_config.json` and `images/` (an `ImageSet`). Everything else is optional: a part of the record that a run did
not write is left out of the page and named there as missing.

Keys of `run.json` that are read, all under `stages.<stage>.metrics` (every key may be absent; units in brackets):

`model`
    `name` str, `num_classes` int | null, `class_names` list[str] | null, `parameters` int.
`images`
    `method` str, `count` int. (The sheet, pixel statistics and quality come from `images/manifest.json`.)
`quantize`
    `method` str and `units`: the fields of a `QuantReport` as JSON (`report.model_dump(mode="json")`); of each unit `name`,
    `start_loss`, `end_loss`, `undecided`, `diverged`, `seconds` and `losses` (evenly spaced, at most about 200 points).
    `scheme` str (one line, `QuantScheme.describe()`).
    `coverage`: list of `{name, kind, weight_bits, input_bits, parameters, macs, reason}` in execution order; bits are
    int | null (null: left in float), `macs` for one image, `reason` str | null.
`evaluate`
    `data` str, the source the accuracy was measured on, in the form `open_images` takes (real images of the sheet).
    `count` int, `set_aside` list of `{name, reason}`.
    `accuracy`: list of rows `{name, top1, top5, interval, agreement, kl, recovery, size_bytes, bit_operations, seconds}`,
    the float network first; `top1`, `top5`, `agreement`, `recovery` are shares 0..1, `interval` is `[low, high]` for
    top1, `kl` [nats]. Any value but `name` may be null. (`Evaluation.row()` and `Cost.row()` make these.)
    `sqnr`: list of rows `{name, weights, activations, alone, cumulative}` [dB] in execution order, null where nothing is
    quantized or no error was made. (`SqnrRow.row()` makes these.)

Also read: `seed`, `version`, `environment`, `recipe`, and `status`, `seconds`, `peak_memory_bytes` of every stage.
"""
