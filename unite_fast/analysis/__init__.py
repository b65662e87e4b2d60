"""What a trained model has become: the analyses of the paper (arXiv 2603.22283, sections 4, 5 and 7) and their kin.

    walk.py        the images or atoms once, in tiles: latents, activations of both passes, predictions at given times
    alignment.py   CKA, CKNNA and cosine of the two passes' activations, layer by layer
    trajectory.py  predicted against clean latents over t, and what the decoder makes of them
    entropy.py     how many bits the weights need, by group
    probe.py       what a linear map and the nearest neighbours read out of latents
    dynamics.py    curves of several runs over each other
    plots.py       the pictures

Each says its definition in ``DEFINITION``, which is written beside its numbers. What needs images adds up sums in
float64 over tiles of a fixed size, each on one process whole: neither the number of processes nor memory for all images
enters the result.
"""
