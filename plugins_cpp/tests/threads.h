// A pool for tests: each task in a thread of its own.
#pragma once

#include <thread>
#include <vector>

#include "reroute/pool.h"

inline reroute::Pool threads(int count) {
    return {[](void*, std::size_t tasks, void (*task)(void*, std::size_t), void* data) {
                std::vector<std::thread> all;
                for (std::size_t i = 0; i < tasks; ++i) all.emplace_back(task, data, i);
                for (auto& one : all) one.join();
            },
            nullptr, count};
}
