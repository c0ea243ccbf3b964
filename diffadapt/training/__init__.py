"""The trainer: every family of pipelines, every adapter type. `diffadapt.train(TrainingOptions(...))` is a run.

* `options.py`, `option_sources.py`, `option_checks.py`: the options, from config files and the command line; checks
* `data_set.py`, `data/`: pictures and captions
* `families/`: what differs between families of pipelines
* `base_model.py`, `encodings.py`, `caches.py`: the frozen base, and what it encodes once
* `new_adapters.py`, `objective.py`, `loss.py`, `noise_levels.py`, `randomness.py`: what is trained, and towards what
* `run.py`, `loop.py`, `optimisers.py`, `ema.py`, `checkpoint.py`, `processes.py`, `block_checkpointing.py`: the run
* `previews.py`, `history.py`, `report_page.py`, `saving.py`: what it shows and writes
"""
