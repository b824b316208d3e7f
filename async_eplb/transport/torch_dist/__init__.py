"""Transports over torch.distributed: gloo for CPUs, NCCL for GPUs."""
