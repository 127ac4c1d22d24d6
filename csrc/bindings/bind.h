#pragma once

#include <nanobind/nanobind.h>

// One function per part of the library; module.cpp calls each once.
void bind_solvers(nanobind::module_& m);
void bind_comm(nanobind::module_& m);
void bind_copy_ranges(nanobind::module_& m);
void bind_partition(nanobind::module_& m);
