// One binding function per op family.
#pragma once

#include <pybind11/pybind11.h>

namespace dsa_rt {

void bind_step(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_layers(pybind11::module_& m);
void bind_linear(pybind11::module_& m);
void bind_quantize(pybind11::module_& m);

}  // namespace dsa_rt
