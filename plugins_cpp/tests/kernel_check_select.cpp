// RerouteSelect: scores within rounding of the CPU reference, and from equal scores exactly its slots.
#include <map>

#include "check.h"
#include "device_memory.h"
#include "kernel_check.h"
#include "select_cases.h"

namespace {

using reroute::SelectInputs;
using reroute::SelectShape;
using reroute::Status;
using reroute::Stream;
using reroute::Workspace;

struct Version {
    const char* name;
    Status (*scores)(const SelectShape&, const SelectInputs&, float*, Workspace, Stream) noexcept;
    Status (*choose)(const SelectShape&, const float*, const SelectInputs&, std::int64_t*, Workspace, Stream) noexcept;
    Status (*whole)(const SelectShape&, const SelectInputs&, std::int64_t*, Workspace, Stream) noexcept;
};

constexpr Version kVersions[] = {
    {"simple", reroute::select_scores_cuda_simple, reroute::select_choose_cuda_simple, reroute::select_cuda_simple},
    {"fast", reroute::select_scores_cuda_fast, reroute::select_choose_cuda_fast, reroute::select_cuda_fast},
};

std::size_t size(std::int64_t n) { return static_cast<std::size_t>(n); }

// Slots, workspace and result of one case on the device.
struct OnDevice {
    const SelectShape& shape;
    device::Buffer<std::int64_t> candidates, always, slots;
    device::Buffer<unsigned char> scratch;
    std::size_t bytes;

    OnDevice(const SelectShape& s, const inputs::Slots& host)
        : shape(s),
          candidates(host.candidates),
          always(host.always),
          slots(size(s.batch * select_length(s))),
          scratch(reroute::select_workspace_bytes(s)),
          bytes(reroute::select_workspace_bytes(s)) {}

    Workspace workspace() { return {scratch.data(), bytes}; }

    // The status of the batch's first refused row.
    Status status() {
        const auto words = scratch.read();
        for (std::int64_t b = 0; b < shape.batch; ++b) {
            std::uint32_t flags;
            std::memcpy(&flags, words.data() + size(b) * sizeof flags, sizeof flags);
            if (reroute::select_status(flags) != Status::kOk) return reroute::select_status(flags);
        }
        return Status::kOk;
    }
};

// Rows with bit-equal keys must have bit-equal scores, or ties would be broken by rounding.
bool equal_keys_tie(const SelectShape& s, const std::vector<float>& keys, const std::vector<std::int64_t>& candidates,
                    const std::vector<float>& scores) {
    const std::int64_t width = s.kv_heads * s.head_size;
    for (std::int64_t b = 0; b < s.batch; ++b) {
        std::map<std::vector<float>, float> score_of;
        for (std::int64_t n = b * s.candidates; n < (b + 1) * s.candidates; ++n) {
            const auto key = keys.begin() + (b * s.rows + candidates[size(n)]) * width;
            const auto [entry, fresh] = score_of.try_emplace({key, key + width}, scores[size(n)]);
            if (!fresh && entry->second != scores[size(n)]) return false;
        }
    }
    return true;
}

void check_case(const SelectCase& c, const Version& version, inputs::Random& random, bool misaligned) {
    const SelectShape& s = c.shape;
    const bool bad = c.fill == inputs::Fill::kOneNaN || c.fill == inputs::Fill::kOneInfinity;
    const auto q_values = inputs::floats(size(s.batch * s.heads * s.head_size), inputs::query_fill(c.fill), random);
    const auto k_values = inputs::floats(size(s.batch * s.rows * s.kv_heads * s.head_size), c.fill, random);
    const inputs::Slots slots(s, c.shuffled, random);
    const auto q_bytes = inputs::encode(q_values, s.dtype);
    const auto k_bytes = inputs::encode(k_values, s.dtype);
    const SelectInputs host{q_bytes.data(), k_bytes.data(), slots.candidates.data(), slots.always.data()};

    device::Buffer<unsigned char> q(q_bytes);
    device::Buffer<unsigned char> k(k_bytes, misaligned ? 4 : 0);
    OnDevice on(s, slots);
    const SelectInputs in{q.data(), k.data(), on.candidates.data(), on.always.data()};
    device::Buffer<float> scores(slots.candidates.size());
    CHECK(version.scores(s, in, scores.data(), on.workspace(), device::stream()) == Status::kOk);
    const auto got = scores.read();

    const Status ran =
        device::captured([&] { return version.whole(s, in, on.slots.data(), on.workspace(), device::stream()); });
    CHECK(ran == Status::kOk);
    const auto chosen = on.slots.read();
    if (bad) {
        CHECK(on.status() == Status::kNotANumber);
        // Every score is NaN, every NaN ties: the first K run.
        std::vector<std::int64_t> first(slots.candidates.begin(), slots.candidates.begin() + s.keep);
        first.insert(first.end(), slots.always.begin(), slots.always.end());
        std::sort(first.begin(), first.end());
        CHECK(chosen == first);
        return;
    }
    std::vector<float> expected(got.size());
    CHECK(select_scores_cpu(s, host, expected.data()) == Status::kOk);
    float worst = 0.0F;
    for (std::size_t i = 0; i < got.size(); ++i) {
        worst = std::max(worst, std::abs(got[i] - expected[i]) / (expected[i] + 1e-30F));
    }
    CHECK(worst < 1e-4F);
    CHECK(equal_keys_tie(s, k_values, slots.candidates, got));
    if (s.batch > 0) CHECK(on.status() == Status::kOk);

    std::vector<std::int64_t> reference(chosen.size());
    CHECK(select_choose_cpu(s, got.data(), host, reference.data()) == Status::kOk);
    CHECK(chosen == reference);
}

void check_choice(const ChooseCase& c, const Version& version, inputs::Random& random) {
    const inputs::Slots slots(c.shape, c.shuffled, random);
    OnDevice on(c.shape, slots);
    device::Buffer<float> scores(c.scores);
    const SelectInputs in{nullptr, nullptr, on.candidates.data(), on.always.data()};
    CHECK(version.choose(c.shape, scores.data(), in, on.slots.data(), on.workspace(), device::stream()) == Status::kOk);
    std::vector<std::int64_t> reference(size(c.shape.batch * select_length(c.shape)));
    const SelectInputs host{nullptr, nullptr, slots.candidates.data(), slots.always.data()};
    CHECK(select_choose_cpu(c.shape, c.scores.data(), host, reference.data()) == Status::kOk);
    CHECK(on.slots.read() == reference);
    CHECK(on.status() == Status::kOk);
}

// What the CPU refuses, the device flags, and the slots it writes stay in range. Equal scores choose the first 8.
void check_refused_slots(const Version& version) {
    const SelectShape s = select_shape(1, 40, 30, 5, 1, 1, 1, 8);
    const std::vector<float> zeros(40, 0.0F);
    device::Buffer<float> keys(zeros);
    inputs::Random random(5);
    const auto check_one = [&](Status expected, auto spoil) {
        inputs::Slots slots(s, false, random);
        spoil(slots);
        OnDevice on(s, slots);
        const SelectInputs host{zeros.data(), zeros.data(), slots.candidates.data(), slots.always.data()};
        const SelectInputs in{keys.data(), keys.data(), on.candidates.data(), on.always.data()};
        std::vector<std::int64_t> unused(size(select_length(s)));
        CHECK(select_cpu(s, host, unused.data()) == expected);
        CHECK(version.whole(s, in, on.slots.data(), on.workspace(), device::stream()) == Status::kOk);
        CHECK(on.status() == expected);
        for (const std::int64_t slot : on.slots.read()) CHECK(slot >= 0 && slot < s.rows);
    };
    for (const std::int64_t slot : {std::int64_t{-1}, std::int64_t{40}, std::int64_t{1} << 40}) {
        check_one(Status::kSlotOutOfRange, [=](inputs::Slots& slots) { slots.candidates[3] = slot; });   // chosen
        check_one(Status::kSlotOutOfRange, [=](inputs::Slots& slots) { slots.candidates[20] = slot; });  // left out
        check_one(Status::kSlotOutOfRange, [=](inputs::Slots& slots) { slots.always[4] = slot; });
    }
    check_one(Status::kSlotRepeated, [](inputs::Slots& slots) { slots.candidates[5] = slots.candidates[4]; });
    check_one(Status::kSlotRepeated, [](inputs::Slots& slots) { slots.always[2] = slots.candidates[4]; });
}

// A NaN ranks last, and a call that cannot work is refused before a launch.
void check_nan_and_calls(const Version& version) {
    const SelectShape s = select_shape(1, 40, 30, 5, 1, 1, 1, 8);
    inputs::Random random(6);
    const inputs::Slots slots(s, false, random);
    OnDevice on(s, slots);
    std::vector<float> scores(30, 0.25F);
    scores[0] = std::numeric_limits<float>::quiet_NaN();
    device::Buffer<float> scores_on(scores);
    const SelectInputs in{nullptr, nullptr, on.candidates.data(), on.always.data()};
    const auto choose = [&](const float* from, std::size_t bytes) {
        return version.choose(s, from, in, on.slots.data(), {on.scratch.data(), bytes}, device::stream());
    };
    CHECK(choose(scores_on.data(), on.bytes) == Status::kOk);
    CHECK(on.status() == Status::kNotANumber);
    std::vector<std::int64_t> expected(slots.candidates.begin() + 1, slots.candidates.begin() + 9);
    expected.insert(expected.end(), slots.always.begin(), slots.always.end());
    std::sort(expected.begin(), expected.end());
    CHECK(on.slots.read() == expected);

    CHECK(choose(scores_on.data(), on.bytes - 1) == Status::kWorkspaceTooSmall);
    CHECK(choose(nullptr, on.bytes) == Status::kNullPointer);
}

}  // namespace

void check_select() {
    for (const Version& version : kVersions) {
        inputs::Random random(4);
        for (const SelectCase& c : select_cases()) {
            check::context = std::string("select ") + version.name + ": " + c.name;
            check_case(c, version, random, false);
        }
        check::context = std::string("select ") + version.name + ": misaligned keys";
        check_case({"", select_shape(1, 100, 70, 30, 4, 2, 64, 17, reroute::DType::kFloat16)}, version, random, true);
        for (const ChooseCase& c : choose_cases(random)) {
            check::context = std::string("choose ") + version.name + ": " + c.name;
            check_choice(c, version, random);
        }
        check::context = std::string("refused ") + version.name;
        check_refused_slots(version);
        check_nan_and_calls(version);
    }
}
