// The parts of reroute_kernel_check.
#pragma once

// Every CUDA version of an op against the CPU reference; failures are counted in check::failures.
void check_select();
void check_rows();

// Prints one JSON object. Only with a GPU.
int run_benchmark();
