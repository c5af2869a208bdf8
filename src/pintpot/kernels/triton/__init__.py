"""Kernels for GPUs, written in Triton. Importing its modules needs the package ``triton`` (the extra ``gpu``)."""
