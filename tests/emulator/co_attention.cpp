// Python module: co-attention's CUDA launchers in the emulator.
#include "cuda/co_attention.cu"
#include "cuda/co_attention_backward.cu"
#include "cuda/co_attention_backward_keys.cu"
#include "cuda/co_attention_global.cu"
#include "cuda/global_attention.cu"
#include "cuda/global_attention_backward.cu"
#include "cuda/sum_slots.cu"

#include <pybind11/stl.h>

#include "emulator/bind.h"

namespace py = pybind11;
using namespace dsnet;
using namespace dsnet::cuda;

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Stands in for the GPU's dense products.
void multiply(const TokenProduct& p, Storage storage) {
  with_storage(p.is_float32 ? Storage::float32 : storage, [&](auto zero) {
    using T = decltype(zero);
    const auto value = [](const void* matrix, int64_t i) {
      return double{widen(load_global<T>(static_cast<const T*>(matrix) + i))};
    };
    for (int64_t i = 0; i < p.left_columns; ++i) {
      for (int64_t j = 0; j < p.right_columns; ++j) {
        double sum = 0;
        for (int64_t row = 0; row < p.rows; ++row) {
          sum += value(p.left, row * p.left_stride + i) * value(p.right, row * p.right_stride + j);
        }
        store_global(p.out + i * p.out_stride + j, static_cast<float>(sum));
      }
    }
  });
}

}  // namespace

PYBIND11_MODULE(emulator_co_attention, m) {
  emulator::bind(m);

  py::enum_<Storage>(m, "Storage", py::module_local())
      .value("float32", Storage::float32)
      .value("bfloat16", Storage::bfloat16)
      .value("float16", Storage::float16);

  py::class_<Parameter>(m, "Parameter", py::module_local())
      .def(py::init(
          [](uintptr_t data, bool is_float32) { return Parameter{at<void>(data), is_float32}; }));
  py::class_<CoAttentionShape>(m, "Shape", py::module_local())
      .def(
          py::init([](int64_t batch, int64_t local_tokens, int64_t global_tokens,
                       int64_t local_width, int64_t global_width, int64_t heads, int64_t head_dim) {
            return CoAttentionShape{
                batch, local_tokens, global_tokens, local_width, global_width, heads, head_dim};
          }));
  py::class_<CoAttentionInputs>(m, "Inputs", py::module_local())
      .def(py::init([](uintptr_t local, uintptr_t global, const std::array<Parameter, 12>& p,
                        double eps, double dropout_p, uintptr_t seed) {
        return CoAttentionInputs{at<void>(local), at<void>(global), p[0], p[1], p[2], p[3], p[4],
            p[5], p[6], p[7], p[8], p[9], p[10], p[11], static_cast<float>(eps),
            dropout_of(dropout_p, at<int64_t>(seed))};
      }));
  py::class_<CoAttentionForward>(m, "Forward", py::module_local())
      .def(py::init([](CoAttentionShape shape, CoAttentionInputs inputs, uintptr_t out_local,
                        uintptr_t out_global, uintptr_t local_softmax, uintptr_t global_softmax,
                        uintptr_t attended) {
        return CoAttentionForward{shape, inputs, at<void>(out_local), at<void>(out_global),
            at<float>(local_softmax), at<float>(global_softmax), at<float>(attended), nullptr};
      }))
      .def_property("workspace", nullptr,
          [](CoAttentionForward& args, uintptr_t address) { args.workspace = at<void>(address); });

  py::class_<CoAttentionBackward>(m, "Backward", py::module_local())
      .def(py::init([](CoAttentionShape shape, CoAttentionInputs inputs, uintptr_t grad_local,
                        uintptr_t grad_global, uintptr_t global_softmax, uintptr_t attended,
                        uintptr_t out_local, uintptr_t out_global, uintptr_t parameters) {
        return CoAttentionBackward{shape, inputs, at<void>(grad_local), at<void>(grad_global),
            at<float>(global_softmax), at<float>(attended), at<void>(out_local),
            at<void>(out_global), at<float>(parameters), nullptr};
      }))
      .def_property("workspace", nullptr,
          [](CoAttentionBackward& args, uintptr_t address) { args.workspace = at<void>(address); });

  py::class_<CoAttentionLaunch>(m, "Launch", py::module_local())
      .def_readonly_static("block_rows", &CoAttentionLaunch::block_rows)
      .def_readonly("absorbed", &CoAttentionLaunch::absorbed)
      .def_readonly("copies_tokens", &CoAttentionLaunch::copies_tokens)
      .def_readonly("copies_grad", &CoAttentionLaunch::copies_grad)
      .def_readonly("packed", &CoAttentionLaunch::packed)
      .def_readonly("columns", &CoAttentionLaunch::columns)
      .def_readonly("column_tile", &CoAttentionLaunch::column_tile)
      .def_readonly("local_tiles", &CoAttentionLaunch::local_tiles)
      .def_readonly("global_tiles", &CoAttentionLaunch::global_tiles)
      .def_readwrite("splits", &CoAttentionLaunch::splits)
      .def_readwrite("split_rows", &CoAttentionLaunch::split_rows)
      .def_readonly("slots", &CoAttentionLaunch::slots)
      .def("__str__", [](const CoAttentionLaunch& l) { return text(l); });

  m.def("launch", [](const CoAttentionForward& args, int absorbed) {
    return co_attention_launch(args, absorbed);
  });
  m.def(
      "workspace", [](const CoAttentionForward& args, Storage storage, const CoAttentionLaunch& l) {
        return co_attention_workspace(args, storage, l);
      });
  m.def("forward", [](const CoAttentionForward& args, Storage storage, const CoAttentionLaunch& l) {
    co_attention_forward(args, storage, l, nullptr);
  });
  m.def("launch", [](const CoAttentionBackward& args, int absorbed) {
    return co_attention_launch(args, absorbed);
  });
  m.def("workspace",
      [](const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l) {
        return co_attention_workspace(args, storage, l);
      });
  m.def(
      "backward", [](const CoAttentionBackward& args, Storage storage, const CoAttentionLaunch& l) {
        co_attention_backward(args, storage, l, nullptr);
        for (const TokenProduct& p : co_attention_products(args, storage, l)) multiply(p, storage);
        co_attention_backward_projections(args, storage, l, nullptr);
      });
}
