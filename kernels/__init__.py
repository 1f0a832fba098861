"""The kernels: selective scan, causal convolution and one-step recurrence, for CPUs and GPUs.

Only somebody who changes a kernel needs to open this folder: its interface is `kernels.selective_scan`.
"""
