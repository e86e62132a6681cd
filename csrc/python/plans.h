#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace llmkern {

void define_plans(pybind11::module_& m);

}  // namespace llmkern
