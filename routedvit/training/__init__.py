"""Everything around the model that trains it. `trainer.py` is the loop; what it calls lies here:

config/       the sections of a run config, their reading, their errors, DeepSpeed's native keys
recipe/       what changes by step: optimiser, rates, capacity, resolution, mixing, averages
objectives/   what is learned: labels, masked patches, a teacher
engine/       the one place that imports DeepSpeed
distributed/  one rank among many: who it is, what all agree on, signals, lost neighbours
checkpoints/  what a run leaves on disk and goes on from
evaluators/   what is measured on held-out images
watch/        what a person sees: console, TensorBoard, routing, gradients, speed

Beside them: `assembly.py` makes these objects from the config, `opening.py` opens the folder of a
run and goes on from what is there, `dry_run.py` with `rehearsal.py` tells beforehand what a run
takes, `offline.py` evaluates weights on disk, `guard.py` notices bad steps.
"""
