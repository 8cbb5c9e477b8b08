// What every function of this library returns. Nothing throws and nothing prints.
#pragma once

#include <cstdint>

namespace reroute {

// The numbers are part of the C ABI (reroute/c_api.h): append, never renumber.
enum class Status : std::int32_t {
    kOk = 0,
    kInvalidShape = 1,       // a negative size, heads that do not divide, more slots than rows
    kNullPointer = 2,        // a tensor that is not empty has no address
    kTooLarge = 3,           // past a limit of reroute/select.h or reroute/rows.h
    kWorkspaceTooSmall = 4,  // less than select_workspace_bytes()
    kNotANumber = 5,         // a score is NaN: there is no best K
    kSlotOutOfRange = 6,     // a slot is not in 0..S-1
    kSlotRepeated = 7,       // candidates and always are not distinct
    kSlotsNotAscending = 8,  // the slots of a scatter do not ascend strictly
    kCuda = 9,               // a launch failed; cuda_error_message() has the runtime's words
    kOutOfMemory = 10,       // only the CPU reference allocates
};

// One sentence, never null; an unknown code is named as such.
const char* describe(Status status) noexcept;

// What the CUDA runtime said when this thread last got Status::kCuda. Static storage.
const char* cuda_error_message() noexcept;

}  // namespace reroute
