// A weight matrix as Python holds it: what functions of other bindings that multiply with one take.
#pragma once

#include <nanobind/nanobind.h>

#include <memory>
#include <string>
#include <vector>

#include "linear.h"

struct PyMatrix {
  mw::Matrix view;
  std::string spec;
  nanobind::object owners[9];  // the arrays behind view
  std::shared_ptr<mw::Levels> levels;
  std::shared_ptr<mw::CodebookMatrix> codebooks;
  // of stacks: the blocks' arrays, and where they lie
  std::vector<nanobind::object> block_owners;
  std::shared_ptr<std::vector<const std::uint8_t*>> blocks;
};
