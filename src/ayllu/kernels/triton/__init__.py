"""Kernels for NVIDIA GPUs, written in Triton. Importing a module of this folder needs torch and triton."""
