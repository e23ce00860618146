"""Generation of images with a trained model. The mathematics is in jdm.diffusion.

sample: `jdm.sample`. editing: interpolation, inversion and edits. labels, request: checks of the
arguments. programs: the compiled programs and their batch sizes. generate: the images of a request,
batch by batch. samples: the result and its files. runs: large runs that can be interrupted.

An image depends on its seed and not on its batch: every image has its own PRNG key, all batches are
padded to one shape, and their rows are split over the devices.
"""
