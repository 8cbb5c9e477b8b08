// Messages of the adapters: to TensorRT's logger when it gave us one, else to stderr.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace reroute::trt {

void set_logger_finder(nvinfer1::ILoggerFinder* finder) noexcept;
void log_error(const std::string& message) noexcept;

}  // namespace reroute::trt
