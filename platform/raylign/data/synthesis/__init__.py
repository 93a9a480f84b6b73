"""Documents written by a model: what it is asked, what is kept of its answers, and whence they are.

After Gunasekar et al. 2023 ("Textbooks are all you need") and Li et al. 2023.
"""
