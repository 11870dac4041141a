"""What all GPU kernels stand on: launching on torch's current device and stream, and compiled modules that are kept."""
