#include "reroute/status.h"

namespace reroute {

const char* describe(Status status) noexcept {
    switch (status) {
        case Status::kOk:
            return "ok";
        case Status::kInvalidShape:
            return "invalid shape: sizes must not be negative, kv_heads must divide heads, and slots must not "
                   "outnumber rows";
        case Status::kNullPointer:
            return "a tensor that is not empty has no address";
        case Status::kTooLarge:
            return "a size is past a limit of reroute/select.h or reroute/rows.h";
        case Status::kWorkspaceTooSmall:
            return "the workspace is smaller than select_workspace_bytes()";
        case Status::kNotANumber:
            return "a score is NaN, so there is no best K: check q_last, keys and scale";
        case Status::kSlotOutOfRange:
            return "a slot is outside 0..rows-1";
        case Status::kSlotRepeated:
            return "a slot occurs twice among candidates and always";
        case Status::kSlotsNotAscending:
            return "the slots of a scatter must ascend strictly";
        case Status::kCuda:
            return "a CUDA launch failed";
        case Status::kOutOfMemory:
            return "out of host memory";
    }
    return "unknown status";
}

}  // namespace reroute
