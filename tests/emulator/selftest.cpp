// Python module of the emulator's own tests.
#include <map>
#include <string>
#include <utility>

#include "cuda/launch.cuh"
#include "emulator/bind.h"
#include "faults.cuh"
#include "primitives.cuh"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;
using emulator::at;

namespace {

using Address = uintptr_t;

using Reverse = void (*)(const float*, float*);

// The correct kernel and the one with the fault.
#define DSNET_PAIR(kernel)                                   \
  {                                                          \
    #kernel, { faults::kernel<false>, faults::kernel<true> } \
  }
const std::map<std::string, std::pair<Reverse, Reverse>> reversals = {
    DSNET_PAIR(missing_barrier),
    DSNET_PAIR(missing_barrier_between_rounds),
    DSNET_PAIR(missing_warp_barrier),
    DSNET_PAIR(missing_wait),
    DSNET_PAIR(short_wait),
    DSNET_PAIR(missing_barrier_after_wait),
    DSNET_PAIR(barrier_in_a_branch),
    DSNET_PAIR(return_before_barrier),
    DSNET_PAIR(two_barriers_for_one),
    DSNET_PAIR(store_past_the_end),
    DSNET_PAIR(shared_store_past_the_end),
    DSNET_PAIR(dynamic_shared_past_the_end),
    DSNET_PAIR(store_to_an_input),
    DSNET_PAIR(unwritten_shared_read),
    DSNET_PAIR(unwritten_global_read),
    DSNET_PAIR(load_of_what_the_kernel_stores),
    DSNET_PAIR(two_stores_to_one_place),
    DSNET_PAIR(misaligned_vector_load),
    DSNET_PAIR(lanes_that_never_come),
    DSNET_PAIR(mask_without_the_caller),
    DSNET_PAIR(source_outside_the_mask),
    DSNET_PAIR(mismatched_shuffles),
    DSNET_PAIR(product_in_two_branches),
    DSNET_PAIR(rows_in_the_same_banks),
};

void reverse(const std::string& name, bool fault, Address in, Address out) {
  const auto& pair = reversals.at(name);
  launch(name.c_str(), fault ? pair.second : pair.first, {{1}, {64}, 256}, nullptr, at<float>(in),
      at<float>(out));
}

const Grid one_warp{{1}, {32}};

void shuffles(int kind, Address in, Address operands, unsigned width, Address out, int bytes) {
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch("shuffles", primitives::shuffles<T>, one_warp, nullptr,
        static_cast<primitives::Shuffle>(kind), at<T>(in), at<unsigned>(operands), width,
        at<T>(out));
  };
  if (bytes == 8) {
    run(double{});
  } else {
    run(float{});
  }
}

template <bool transposed>
void load_matrices(int matrices, Address in, Address out) {
  const auto kernel = matrices == 1   ? primitives::loads_of_matrices<transposed, 1>
                      : matrices == 2 ? primitives::loads_of_matrices<transposed, 2>
                                      : primitives::loads_of_matrices<transposed, 4>;
  launch("loads_of_matrices", kernel, one_warp, nullptr, at<uint16_t>(in), at<uint32_t>(out));
}

template <typename T>
void product(Address a, Address b, Address c, Address d) {
  launch("product_of_16_bit", primitives::product_of_16_bit<T>, one_warp, nullptr, at<T>(a),
      at<T>(b), at<float>(c), at<float>(d));
}

// A conversion of the emulator applied to every element.
template <typename To, typename From, typename Convert>
auto elementwise(Convert convert) {
  return [convert](const py::array_t<From>& in) {
    py::array_t<To> out(in.size());
    for (py::ssize_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = convert(in.data()[i]);
    return out;
  };
}

}  // namespace

PYBIND11_MODULE(emulator_selftest, m) {
  emulator::bind(m);
  py::list names;
  for (const auto& [name, pair] : reversals) names.append(name);
  m.attr("reversals") = names;
  m.def("reverse", &reverse);
  m.def("shuffles", &shuffles);
  m.def("votes", [](Address in, unsigned width, Address out) {
    launch("votes", primitives::votes, one_warp, nullptr, at<int>(in), width, at<int>(out));
  });
  m.def("load_matrices", &load_matrices<false>);
  m.def("load_matrices_transposed", &load_matrices<true>);
  m.def("product_bf16", &product<__nv_bfloat16>);
  m.def("product_f16", &product<__half>);
  m.def("product_tf32", [](Address a, Address b, Address c, bool rounded, Address d) {
    launch("product_of_tf32", primitives::product_of_tf32, one_warp, nullptr, at<float>(a),
        at<float>(b), at<float>(c), rounded, at<float>(d));
  });
  m.def("zero_fill", [](Address in, Address sizes, Address out) {
    launch("zero_fill", primitives::zero_fill, one_warp, nullptr, at<uint8_t>(in), at<int>(sizes),
        at<uint8_t>(out));
  });
  m.def("order_of_threads", [](Address in, Address out, unsigned blocks, unsigned threads) {
    int next = 0;
    launch("order_of_threads", primitives::order_of_threads, {{blocks}, {threads}}, nullptr,
        at<int>(in), at<int>(out), &next);
  });
  m.def("launch_on", [](Address stream, Address expected) {
    emulator::expect_stream(at<void>(expected));
    launch("on_a_stream", +[] {}, one_warp, at<CUstream_st>(stream));
    emulator::expect_stream(nullptr);
  });
  m.def("round_bf16",
      elementwise<uint16_t, float>([](float x) { return __float2bfloat16_rn(x).bits; }));
  m.def("round_f16", elementwise<uint16_t, float>([](float x) { return __float2half_rn(x).bits; }));
  m.def("widen_f16", elementwise<float, uint16_t>([](uint16_t x) { return __half2float({x}); }));
}
