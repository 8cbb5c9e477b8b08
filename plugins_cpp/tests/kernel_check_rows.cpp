// RerouteGather and RerouteScatter: bit-identical to the CPU reference for every row size and alignment.
#include "check.h"
#include "device_memory.h"
#include "inputs.h"
#include "kernel_check.h"
#include "reroute/rows.h"

namespace {

using reroute::RowsShape;
using reroute::Status;
using reroute::Stream;
using Bytes = std::vector<unsigned char>;

struct Version {
    const char* name;
    Status (*gather)(const RowsShape&, const void*, const std::int64_t*, void*, Stream) noexcept;
    Status (*scatter)(const RowsShape&, const void*, const std::int64_t*, const void*, void*, Stream) noexcept;
};

constexpr Version kVersions[] = {
    {"simple", reroute::gather_cuda_simple, reroute::scatter_cuda_simple},
    {"fast", reroute::gather_cuda_fast, reroute::scatter_cuda_fast},
};

void check_case(const Version& version, const RowsShape& s, std::size_t offset) {
    check::context = std::string("rows ") + version.name + ": B " + std::to_string(s.batch) + ", S " +
                     std::to_string(s.rows) + ", A " + std::to_string(s.picked) + ", bytes " +
                     std::to_string(s.row_bytes) + ", offset " + std::to_string(offset);
    inputs::Random random(6);
    const Bytes full = inputs::bytes(s.batch * s.rows * s.row_bytes, random);
    const Bytes picked = inputs::bytes(s.batch * s.picked * s.row_bytes, random);
    const auto slots = inputs::ascending_slots(s.batch, s.rows, s.picked, random);
    device::Buffer<unsigned char> full_on(full, offset);
    device::Buffer<unsigned char> picked_on(picked, offset);
    device::Buffer<unsigned char> gathered(picked.size(), offset);
    device::Buffer<unsigned char> updated(full.size(), offset);
    device::Buffer<std::int64_t> slots_on(slots);
    const Stream stream = device::stream();

    Bytes expected(picked.size());
    CHECK(gather_cpu(s, full.data(), slots.data(), expected.data()) == Status::kOk);
    CHECK(device::captured([&] {
              return version.gather(s, full_on.data(), slots_on.data(), gathered.data(), stream);
          }) == Status::kOk);
    CHECK(gathered.read() == expected);

    expected.resize(full.size());
    CHECK(scatter_cpu(s, full.data(), slots.data(), picked.data(), expected.data()) == Status::kOk);
    CHECK(device::captured([&] {
              return version.scatter(s, full_on.data(), slots_on.data(), picked_on.data(), updated.data(), stream);
          }) == Status::kOk);
    CHECK(updated.read() == expected);
    CHECK(full_on.read() == full);

    CHECK(version.scatter(s, full_on.data(), slots_on.data(), picked_on.data(), full_on.data(), stream) == Status::kOk);
    CHECK(full_on.read() == expected);
}

// A slot out of range: zeros from a gather, nothing from a scatter, never an access out of bounds.
void check_out_of_range(const Version& version) {
    check::context = std::string("rows ") + version.name + ": slots out of range";
    const RowsShape s{1, 3, 3, 16};
    inputs::Random random(7);
    const Bytes full = inputs::bytes(48, random);
    const Bytes picked = inputs::bytes(48, random);
    device::Buffer<unsigned char> full_on(full);
    device::Buffer<unsigned char> picked_on(picked);
    device::Buffer<unsigned char> out(48);
    device::Buffer<std::int64_t> slots(std::vector<std::int64_t>{-1, 1, std::int64_t{1} << 40});
    CHECK(version.gather(s, full_on.data(), slots.data(), out.data(), device::stream()) == Status::kOk);
    Bytes expected(48, 0);
    std::copy(full.begin() + 16, full.begin() + 32, expected.begin() + 16);
    CHECK(out.read() == expected);
    CHECK(version.scatter(s, full_on.data(), slots.data(), picked_on.data(), out.data(), device::stream()) ==
          Status::kOk);
    expected = full;
    std::copy(picked.begin() + 16, picked.begin() + 32, expected.begin() + 16);
    CHECK(out.read() == expected);
    CHECK(version.scatter(s, full_on.data(), slots.data(), picked_on.data(), full_on.data(), device::stream()) ==
          Status::kOk);
    CHECK(full_on.read() == expected);
    CHECK(version.gather(s, nullptr, slots.data(), out.data(), device::stream()) == Status::kNullPointer);
    CHECK(version.gather({1, 0, 0, 16}, nullptr, nullptr, nullptr, device::stream()) == Status::kOk);
}

}  // namespace

void check_rows() {
    for (const Version& version : kVersions) {
        for (const std::int64_t row_bytes : {1, 2, 6, 12, 16, 20, 40, 256, 4112}) {
            const std::int64_t rows = row_bytes > 1000 ? 5 : 9;
            for (const std::int64_t picked : {std::int64_t{0}, std::int64_t{1}, rows / 2, rows}) {
                check_case(version, {2, rows, picked, row_bytes}, 0);
            }
        }
        for (const std::size_t offset : {1, 2, 4, 8}) check_case(version, {1, 7, 3, 48}, offset);
        check_case(version, {1, 1, 1, 16}, 0);
        check_case(version, {1, 4, 2, 0}, 0);
        check_case(version, {0, 4, 2, 8}, 0);
        check_case(version, {3, 600, 70, 8}, 0);
        check_out_of_range(version);
    }
}
