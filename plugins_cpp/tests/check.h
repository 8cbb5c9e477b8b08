// The smallest test harness that does: counts, names the case, goes on after a failure.
#pragma once

#include <cstdio>
#include <string>

namespace check {

inline int failures = 0;
inline int checks = 0;
inline std::string context;  // what is being tested, for the message

inline bool that(bool good, const char* expression, const char* file, int line) {
    ++checks;
    if (!good) {
        ++failures;
        std::fprintf(stderr, "%s:%d: %s: not true: %s\n", file, line, context.c_str(), expression);
    }
    return good;
}

// The exit code of main.
inline int finish(const char* name) {
    std::printf("%s: %d checks, %d failures\n", name, checks, failures);
    return failures == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(expression) check::that(static_cast<bool>(expression), #expression, __FILE__, __LINE__)
