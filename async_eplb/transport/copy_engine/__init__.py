"""The transport that reads peers' live weights through CUDA IPC, with the GPU's copy engines."""
