"""How good a model is, on pictures that are fixed once, and whether it is better than another one."""
