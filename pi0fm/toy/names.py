"""Words of `pi0fm flow demo`: data sets, methods and pictures by name, as toy/datasets, toy/methods and toy/pictures make them.

Owns: the names. Does not know: what stands behind one; torch is not imported, so that a command line may read them.
"""

DATASETS = ("moons", "checkerboard", "eight_gaussians", "spiral")
METHODS = ("flow", "cnf", "diffusion")
PICTURES = ("over_time", "trajectories", "field", "learned", "comparison")
