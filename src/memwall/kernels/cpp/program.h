// Kernel calls whose arguments are checked and bound once: run at once, or kept in a Program and run for every token.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include <nanobind/nanobind.h>

namespace mw {

// Holds the arrays it works on; runs without the GIL.
using Step = std::function<void()>;

}  // namespace mw

// Decoding makes the same calls for every token and layer. Through Python each costs some microseconds, and more once the weights
// have swept the interpreter out of the caches; a program costs that once.
struct Program {
  std::vector<mw::Step> steps;

  void extend(const Program& other) { steps.insert(steps.end(), other.steps.begin(), other.steps.end()); }

  void run() const {
    nanobind::gil_scoped_release release;
    for (const auto& step : steps) step();
  }
};

// Binds `prepare`, which checks arguments and returns the call as a Step, twice: as a function that runs it and as a method of
// Program that keeps it.
template <class... Arguments, class... Extra>
void bind_step(nanobind::module_& m, nanobind::class_<Program>& program, const char* name, mw::Step (*prepare)(Arguments...),
               const Extra&... extra) {
  m.def(
      name,
      [prepare](Arguments... arguments) {
        const mw::Step step = prepare(std::move(arguments)...);
        nanobind::gil_scoped_release release;
        step();
      },
      extra...);
  program.def(
      name,
      [prepare](Program& self, Arguments... arguments) { self.steps.push_back(prepare(std::move(arguments)...)); }, extra...);
}
