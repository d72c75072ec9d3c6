// The module fused_opt._C: what Python sees of the native code. fused_opt/_plan.py is its caller.
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <unistd.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <unordered_set>

#include "cpu/multi_tensor_apply.h"
#include "cuda/multi_tensor_apply.h"
#include "pass.h"
#include "plan.h"
#include "rules/norm.h"
#include "rules/schedule.h"
#include "tensor_reader.h"

namespace py = pybind11;

namespace fused_opt {
namespace {

PyObject* row_error = nullptr;
PyObject* cuda_error = nullptr;

// Python exceptions whose arguments are the fields of ours. The translator is local: a process may
// have a second build of this module, whose errors are other classes.
void register_errors(py::module_& module) {
  row_error = py::exception<RowError>(module, "RowError").release().ptr();
  cuda_error = py::exception<cuda::CudaError>(module, "CudaError").release().ptr();
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      std::rethrow_exception(pointer);
    } catch (const cuda::CudaError& error) {
      PyErr_SetObject(cuda_error, py::make_tuple(error.code, error.what()).ptr());
    }
  });
}

TensorReader& reader() {
  static TensorReader* const instance = new TensorReader;  // never freed: it holds Python objects
  return *instance;
}

// Lets other threads run Python code. Up to Python 3.13, an interpreter that shuts down ends daemon
// threads when they come back for the GIL, by unwinding their stack through whatever destructors
// there are. Such a thread sleeps here instead, as from 3.14 on, until the process is gone.
class ReleasedGil {
 public:
  ReleasedGil() : state_(PyEval_SaveThread()) {}
  ReleasedGil(const ReleasedGil&) = delete;
  ~ReleasedGil() {
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      while (true) pause();
    }
  }

 private:
  PyThreadState* const state_;
};

// Marks something as in use, as long as it lives.
class InUse {
 public:
  explicit InUse(bool& mark) : mark_(mark) { mark_ = true; }
  InUse(const InUse&) = delete;
  ~InUse() { mark_ = false; }

 private:
  bool& mark_;
};

// Looks parameters up in a dict that is mostly in their order. Walking along costs 5 ns a tensor;
// hashing one calls back into Python and costs 80.
class DictWalk {
 public:
  void rewind() { position_ = 0; }

  // The value as a borrowed reference, or null.
  PyObject* find(PyObject* dict, PyObject* key) {
    Py_ssize_t position = position_;
    PyObject *found, *value;
    for (int ahead = 0; ahead < kLookAhead && PyDict_Next(dict, &position, &found, &value);
         ++ahead) {
      if (found != key) continue;
      position_ = position;
      return value;
    }
    value = PyDict_GetItemWithError(dict, key);
    if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return value;
  }

 private:
  static constexpr int kLookAhead = 8;  // parameters without a gradient may lie between
  Py_ssize_t position_ = 0;
};

// A list, or None where a stream is absent.
void require_list(PyObject* object) {
  if (object == Py_None || PyList_Check(object)) return;
  throw py::type_error(std::string("expected a list or None, got ") + Py_TYPE(object)->tp_name);
}

// An entry of such a list as a borrowed reference. Asked each time: what runs in between may be
// Python code of the user's, which may shorten the list.
PyObject* entry_at(PyObject* list, size_t i) {
  if (list == Py_None) return Py_None;
  if (i >= size_t(PyList_GET_SIZE(list))) throw py::value_error("expected lists of one length");
  return PyList_GET_ITEM(list, i);
}

// Rows of tensors as Python lists, for the few that Python has to look at.
struct Rows {
  py::list ordinals;
  py::list streams[kStreams];
  bool has[kStreams] = {true, true, true, true, true};

  void append(PyObject* const (&tensors)[kStreams], uint32_t ordinal) {
    ordinals.append(ordinal);
    for (int s = 0; s < kStreams; ++s) {
      if (has[s]) streams[s].append(py::handle(tensors[s]));
    }
  }
  py::tuple tuple() const {
    py::object lists[kStreams];
    for (int s = 0; s < kStreams; ++s) lists[s] = has[s] ? py::object(streams[s]) : py::none();
    return py::make_tuple(lists[kParam], lists[kGrad], lists[kMomentum], lists[kShadow],
                          lists[kRefinement], ordinals);
  }
};

ScheduleHyper make_schedule(int kind, const std::vector<double>& parameters) {
  if (kind < 0 || kind >= kScheduleKinds || parameters.size() > kScheduleParameters) {
    throw py::value_error("expected a kind of schedule, and its parameters");
  }
  ScheduleHyper schedule;
  schedule.kind = ScheduleKind(kind);
  std::copy(parameters.begin(), parameters.end(), schedule.parameters);
  return schedule;
}

// What became of a row that was offered.
enum class Outcome { kAdded, kFresh, kForTorch, kScattered };

// A step of rows on the CPU that is run later, by a thread that knows nothing of Python. Whoever
// enqueues it keeps the memory that it points to.
class HostJob {
 public:
  HostJob(TensorList list, int threads) : list_(std::move(list)), threads_(threads) {}

  // A copy that is made where averages are updated: addresses, and how many bytes.
  void add_copy(uintptr_t target, uintptr_t source, int64_t bytes) {
    list_.copies.push_back(
        {reinterpret_cast<void*>(target), reinterpret_cast<const void*>(source), bytes});
  }

  void run() const { cpu::multi_tensor_apply(list_, threads_); }

  // Enqueues it on a CUDA stream.
  void enqueue([[maybe_unused]] uintptr_t stream) const {
#if FUSED_OPT_WITH_CUDA
    cuda::run_on_host([job = *this] { job.run(); }, reinterpret_cast<void*>(stream));
#else
    throw std::logic_error("fused_opt was built without CUDA kernels");
#endif
  }

 private:
  TensorList list_;
  int threads_;
};

// A step in the making. Python adds tensors, has them checked, and runs them.
class PyPlan {
 public:
  ~PyPlan() { clear(); }

  void clear() {
    require_idle();
    plan_.clear();
    runs_ = 0;
    seen_.rewind();
    state_walk_.rewind();
    shadow_walk_.rewind();
    params_.clear();
    written_.clear();
    shadowed_ = 0;
    has_lone_grads_ = false;
    frozen_ = nullptr;
    // Dropping the last reference to an object may run Python code: the plan is empty by then.
    std::vector<PyObject*> released;
    released.swap(held_);
    for (PyObject* object : released) Py_DECREF(object);
    released.clear();
    if (held_.empty()) held_.swap(released);  // keep the capacity
  }

  // Tells what shadows are averages with, before rows with shadows are added: a decay each, the
  // count of steps so far, which steps update (AverageRule), and the parameters whose shadows copy
  // them while they do not require a gradient.
  void set_averages(const std::vector<double>& decays, int64_t steps, int64_t every, int64_t after,
                    const py::frozenset& frozen) {
    require_idle();
    if (decays.empty() || decays.size() > size_t(kMaxAverages)) {
      throw py::value_error("expected 1 to " + std::to_string(kMaxAverages) + " averages, got " +
                            std::to_string(decays.size()));
    }
    if (!params_.empty()) throw std::logic_error("expected averages before rows are added");
    if (every < 1 || after < 0) {
      throw py::value_error("expected averages of every 1 or more steps, after 0 or more, got " +
                            std::to_string(every) + " and " + std::to_string(after));
    }
    std::vector<AverageHyper> averages(decays.size());
    for (size_t k = 0; k < decays.size(); ++k) averages[k].decay = decays[k];
    AverageSteps average_steps;
    average_steps.steps = steps;
    average_steps.every = every;
    average_steps.after = after;
    plan_.set_averages(std::move(averages), average_steps);
    set_frozen(frozen);
  }

  // Tells those parameters anew, for rows that come later.
  void set_frozen(const py::frozenset& frozen) {
    hold(frozen.ptr());
    frozen_ = PySet_GET_SIZE(frozen.ptr()) == 0 ? nullptr : frozen.ptr();
  }

  // Gives an average a schedule in place of its decay.
  void set_schedule(int average, int kind, const std::vector<double>& parameters) {
    plan_.set_schedule(average, make_schedule(kind, parameters));
  }

  // Adds the parameters of a param group that have a gradient, with the momentum and the refinement
  // that `state` keeps under these keys (None: without it) and their shadow (`shadows` may be
  // None), or the tuple of their shadows where there are several averages. They are numbered from
  // `first_ordinal` on, those without a gradient too.
  //
  // Returns (fresh, refused, for_torch, scattered): the rows whose momentum or refinement does not
  // exist yet; those that were checked but not added; and which of the latter are for torch, and
  // which are to be offered again as dense copies.
  py::tuple add_param_group(const py::list& params, const py::dict& state,
                            const py::object& momentum_key, const py::object& refinement_key,
                            const py::object& shadows, uint32_t first_ordinal, const Group& group) {
    require_idle();
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    const bool has_momentum = !momentum_key.is_none(), has_refinement = !refinement_key.is_none();
    const bool has_shadows = !shadows.is_none();
    if (has_shadows && !PyDict_Check(shadows.ptr())) {
      throw py::type_error("expected the shadows as a dict");
    }
    Rows fresh, refused;
    fresh.has[kMomentum] = refused.has[kMomentum] = has_momentum;
    fresh.has[kShadow] = refused.has[kShadow] = has_shadows;
    fresh.has[kRefinement] = refused.has[kRefinement] = has_refinement;
    std::vector<size_t> for_torch, scattered;
    const uint16_t index = plan_.add_group(group);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(params.ptr()); ++i) {
      PyObject* const param = PyList_GET_ITEM(params.ptr(), i);
      const auto grad = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, grad_name));
      if (!grad) throw py::error_already_set();
      if (grad.is_none()) continue;
      PyObject* tensors[kStreams] = {param, grad.ptr(), Py_None, Py_None, Py_None};
      if (has_shadows) tensors[kShadow] = shadow_of(shadows.ptr(), param);
      if (has_momentum || has_refinement) {
        PyObject* const param_state = state_of(state.ptr(), param);
        if (has_momentum) tensors[kMomentum] = entry_of(param_state, momentum_key.ptr());
        if (has_refinement) tensors[kRefinement] = entry_of(param_state, refinement_key.ptr());
      }
      const uint32_t ordinal = first_ordinal + uint32_t(i);
      const bool complete = !has_momentum || tensors[kMomentum] != Py_None;
      const Outcome outcome =
          complete ? add_row(tensors, index, ordinal, group.reset_grads, false, has_refinement)
                   : Outcome::kFresh;
      if (outcome == Outcome::kAdded) continue;
      if (outcome == Outcome::kFresh) {
        fresh.append(tensors, ordinal);
        continue;
      }
      (outcome == Outcome::kForTorch ? for_torch : scattered).push_back(refused.streams[0].size());
      refused.append(tensors, ordinal);
    }
    return py::make_tuple(fresh.tuple(), refused.tuple(), for_torch, scattered);
  }

  // Adds rows as parallel lists. A list may be None, or hold None, where a stream is absent;
  // without ordinals all are 0. Returns the indices of the rows that were checked but not added:
  // those for torch, and those to be offered again as dense `copies`.
  py::tuple add(const py::list& params, const py::object& grads, const py::object& momentums,
                const py::object& shadows, const py::object& refinements,
                const std::optional<std::vector<uint32_t>>& ordinals, const Group& group,
                bool copies) {
    require_idle();
    PyObject* const lists[kStreams] = {params.ptr(), grads.ptr(), momentums.ptr(), shadows.ptr(),
                                       refinements.ptr()};
    for (PyObject* const list : lists) require_list(list);
    std::vector<size_t> for_torch, scattered;
    const uint16_t index = plan_.add_group(group);
    for (size_t i = 0; i < params.size(); ++i) {
      PyObject* tensors[kStreams];
      for (int s = 0; s < kStreams; ++s) tensors[s] = entry_at(lists[s], i);
      const uint32_t ordinal = ordinals ? ordinals->at(i) : 0;
      const Outcome outcome = add_row(tensors, index, ordinal, group.reset_grads, copies);
      if (outcome == Outcome::kForTorch) for_torch.push_back(i);
      if (outcome == Outcome::kScattered) scattered.push_back(i);
    }
    return py::make_tuple(for_torch, scattered);
  }

  // Adds gradients that are clipped by themselves. Returns the same indices as `add`.
  py::tuple add_grads(const py::list& grads, bool copies) {
    require_idle();
    has_lone_grads_ = true;
    std::vector<size_t> for_torch, scattered;
    for (size_t i = 0; i < grads.size(); ++i) {
      PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
      params_.push_back(grad);
      hold(grad);
      const auto reach = read(grad, kGrad, views_[kGrad]);
      if (!copies) written_.push_back(grad);
      if (reach == TensorReader::Reach::kTorch || !views_[kGrad].has_kernels) {
        plan_.skip_row();
        for_torch.push_back(i);
      } else if (!plan_.add_grad(views_[kGrad], copies)) {
        scattered.push_back(i);
      }
    }
    return py::make_tuple(for_torch, scattered);
  }

  // The parameters that have a shadow and were not added with it, and their shadows: frozen ones,
  // those without a gradient this time, those of other optimizers.
  std::pair<py::list, py::list> untouched(const py::dict& shadows) const {
    std::pair<py::list, py::list> left;
    if (shadowed_ == shadows.size()) return left;
    if (params_.empty()) {  // an update of averages alone
      return {py::reinterpret_steal<py::list>(PyDict_Keys(shadows.ptr())),
              py::reinterpret_steal<py::list>(PyDict_Values(shadows.ptr()))};
    }
    const std::unordered_set<PyObject*> added(params_.begin(), params_.end());
    for (const auto& [param, shadow] : shadows) {
      if (added.count(param.ptr())) continue;
      left.first.append(param);
      left.second.append(shadow);
    }
    return left;
  }

  void check() {
    require_idle();
    explain([&] { plan_.check_overlap(); });
  }

  // The tensors that the step writes in place, for their version counters. Momentum buffers are
  // the optimizer's own: no graph holds them.
  py::list written() const {
    py::list list(written_.size());
    for (size_t i = 0; i < written_.size(); ++i) {
      Py_INCREF(written_[i]);
      PyList_SET_ITEM(list.ptr(), i, written_[i]);
    }
    return list;
  }

  std::vector<int> devices() const { return plan_.devices(); }

  // The chunks of all gradients on a device, and whether one of them is float64.
  std::pair<int64_t, bool> norm_chunks(int device) {
    int64_t chunks = 0;
    bool has_float64 = false;
    for (const TensorRow& row : plan_.grads(device).rows) {
      chunks += rules::sum_chunks(row.numel);
      has_float64 = has_float64 || row.dtype[kGrad] == DType::kFloat64;
    }
    return {chunks, has_float64};
  }

  // Writes the norm of all gradients on a device, and the coefficient that clips them, to
  // `result`: the address of two doubles there, and on CUDA of one more for each chunk.
  void grad_norm(int device, int threads, const ClipHyper& hyper, uintptr_t result) {
    require_idle();
    const TensorList grads = plan_.grads(device);
    double* const output = reinterpret_cast<double*>(result);
    if (device == kCpu) {
      const InUse running(is_running_);
      const ReleasedGil released;
      cpu::grad_norm(grads, hyper, threads, output);
      return;
    }
#if FUSED_OPT_WITH_CUDA
    void* stream = reader().current_stream(device);
    const InUse running(is_running_);
    const ReleasedGil released;
    cuda::grad_norm(grads, hyper, device, stream, output);
#else
    throw std::logic_error("fused_opt was built without CUDA kernels");
#endif
  }

  // Multiplies all gradients on a device: on the CPU by the number, on CUDA by what is there at
  // the address.
  void scale_grads(int device, int threads, double coefficient,
                   [[maybe_unused]] uintptr_t device_coefficient) {
    require_idle();
    const TensorList grads = plan_.grads(device);
    if (device == kCpu) {
      const InUse running(is_running_);
      const ReleasedGil released;
      cpu::scale_grads(grads, coefficient, threads);
      return;
    }
#if FUSED_OPT_WITH_CUDA
    void* stream = reader().current_stream(device);
    const InUse running(is_running_);
    const ReleasedGil released;
    cuda::scale_grads(grads, reinterpret_cast<const double*>(device_coefficient), device, stream);
#else
    throw std::logic_error("fused_opt was built without CUDA kernels");
#endif
  }

  // Before a device is run: the address of a number on it, for the groups that were made with these
  // `tensors`, or for all with -1.
  void set_scalar(int tensors, int which, uintptr_t address, bool is_double) {
    if (which < 0 || which >= kScalars) throw py::value_error("expected the number of a scalar");
    plan_.set_scalar(tensors, Scalar(which), {reinterpret_cast<const void*>(address), is_double});
  }

  // The same for the decay of an average.
  void set_decay(int average, uintptr_t address, bool is_double) {
    plan_.set_decay(average, {reinterpret_cast<const void*>(address), is_double});
  }

  // And the address of a count of steps, which is added to that of the averages.
  void set_average_steps(uintptr_t address) {
    plan_.set_average_steps(reinterpret_cast<const int64_t*>(address));
  }

  // And the address of a count of steps, by which the groups round that do so stochastically.
  void set_rounding_steps(uintptr_t address) {
    plan_.set_rounding_steps(reinterpret_cast<const int64_t*>(address));
  }

  // And the addresses of a float that skips the step and of the counters of steps that are taken.
  void set_gate(uintptr_t found_inf, const std::vector<uintptr_t>& counters) {
    Gate gate;
    gate.found_inf = reinterpret_cast<const float*>(found_inf);
    for (const uintptr_t counter : counters) {
      gate.counters.push_back(reinterpret_cast<int64_t*>(counter));
    }
    plan_.set_gate(gate);
  }

  // The bytes on the device that `run` needs for what was set so.
  int64_t memory_bytes([[maybe_unused]] int device) {
#if FUSED_OPT_WITH_CUDA
    if (device != kCpu) return cuda::memory_bytes(plan_.list(device));
#endif
    return 0;
  }

  // What `run` would do on the CPU, to be done later.
  HostJob host_job(int threads) {
    require_steps();
    return {plan_.list(kCpu), threads};
  }

  void run(int device, int threads, [[maybe_unused]] uintptr_t memory) {
    require_idle();
    require_steps();
    const TensorList& list = plan_.list(device);
    if (device == kCpu) {
      const InUse running(is_running_);
      const ReleasedGil released;
      cpu::multi_tensor_apply(list, threads);
      ++runs_;
      return;
    }
#if FUSED_OPT_WITH_CUDA
    void* stream = reader().current_stream(device);
    const InUse running(is_running_);
    const ReleasedGil released;
    cuda::multi_tensor_apply(list, device, stream, reinterpret_cast<void*>(memory));
    ++runs_;
#else
    throw std::logic_error("fused_opt was built without CUDA kernels");
#endif
  }

  // Whether all devices were run: Python may be interrupted before it can note that itself.
  bool has_run() const { return runs_ > 0 && runs_ >= plan_.devices().size(); }

 private:
  // Gradients by themselves have no group and nothing to step.
  void require_steps() const {
    if (has_lone_grads_) throw std::logic_error("expected no gradients without their parameters");
  }

  // The state of a parameter, or null.
  PyObject* state_of(PyObject* state, PyObject* param) {
    PyObject* const param_state = state_walk_.find(state, param);
    if (param_state != nullptr && !PyDict_Check(param_state)) {
      throw py::type_error("expected the optimizer's state of a parameter as a dict");
    }
    return param_state;
  }

  static PyObject* entry_of(PyObject* param_state, PyObject* key) {
    if (param_state == nullptr) return Py_None;
    PyObject* const entry = PyDict_GetItemWithError(param_state, key);
    if (entry == nullptr && PyErr_Occurred()) throw py::error_already_set();
    return entry == nullptr ? Py_None : entry;
  }

  PyObject* shadow_of(PyObject* shadows, PyObject* param) {
    PyObject* const shadow = shadow_walk_.find(shadows, param);
    return shadow == nullptr ? Py_None : shadow;
  }

  // refines: a half-precision parameter must come with a refinement, or the row is fresh.
  Outcome add_row(PyObject* const (&tensors)[kStreams], uint16_t group, uint32_t ordinal,
                  bool resets, bool copies, bool refines = false) {
    params_.push_back(tensors[kParam]);
    more_shadows_.clear();
    Plan::Row row = {{}, more_shadows_, group, ordinal, false};
    auto reach = TensorReader::Reach::kKernels;
    const size_t written = written_.size();
    // All before any is read: that may run Python code, which may drop the others.
    for (PyObject* const tensor : tensors) {
      if (tensor != Py_None) hold(tensor);
    }
    for (int s = 0; s < kStreams; ++s) {
      const bool required = s == kParam || (s == kShadow && tensors[kGrad] == Py_None);
      if (tensors[s] == Py_None && !required) continue;
      row.views[s] = &views_[s];
      reach = std::max(
          reach, s == kShadow ? read_shadows(tensors[s]) : read(tensors[s], Stream(s), views_[s]));
    }
    if (refines && tensors[kRefinement] == Py_None && is_half(views_[kParam])) {
      params_.pop_back();
      written_.resize(written);
      return Outcome::kFresh;
    }
    if (row.views[kGrad]) written_.push_back(tensors[kParam]);
    if (row.views[kGrad] && resets) written_.push_back(tensors[kGrad]);
    row.frozen = row.views[kShadow] && is_frozen(tensors[kParam]);
    const bool is_number = views_[kParam].has_kernels && views_[kParam].dtype != DType::kInt16;
    if (reach == TensorReader::Reach::kTorch || !is_number) {
      plan_.skip_row();
      return Outcome::kForTorch;
    }
    bool added = false;
    explain([&] { added = plan_.add_row(row, copies); });
    shadowed_ += added && row.views[kShadow] != nullptr;
    return added ? Outcome::kAdded : Outcome::kScattered;
  }

  // Whether shadows copy a parameter. Hashing one costs most, and most train.
  bool is_frozen(PyObject* param) const {
    static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
    if (frozen_ == nullptr) return false;
    const auto required = py::reinterpret_steal<py::object>(PyObject_GetAttr(param, requires_grad));
    if (!required) throw py::error_already_set();
    if (required.ptr() != Py_False) return false;
    const int found = PySet_Contains(frozen_, param);
    if (found < 0) throw py::error_already_set();
    return found != 0;
  }

  // Reads the shadow of a row, or the tuple of those of several averages.
  TensorReader::Reach read_shadows(PyObject* shadows) {
    const bool is_tuple = PyTuple_CheckExact(shadows);
    const size_t count = is_tuple ? PyTuple_GET_SIZE(shadows) : 1;
    if (count != plan_.averages()) {
      const std::string message = "expected one tensor for each of " +
                                  std::to_string(plan_.averages()) + " averages, got " +
                                  std::to_string(count);
      fail(PyExc_ValueError, params_.size() - 1, kShadow, message.c_str());
    }
    auto reach = TensorReader::Reach::kKernels;
    more_shadows_.resize(count - 1);
    for (size_t k = 0; k < count; ++k) {
      PyObject* const shadow = is_tuple ? PyTuple_GET_ITEM(shadows, k) : shadows;
      TensorView& view = k == 0 ? views_[kShadow] : more_shadows_[k - 1];
      reach = std::max(reach, read(shadow, shadow_stream(int(k)), view));
      written_.push_back(shadow);
    }
    return reach;
  }

  static bool is_half(const TensorView& view) {
    return view.has_kernels && (view.dtype == DType::kBFloat16 || view.dtype == DType::kFloat16);
  }

  // The tensors of a running step are not to be touched: memory would be lost under it.
  void require_idle() const {
    if (is_running_) {
      throw std::runtime_error("expected one step at a time, and another thread is in this one");
    }
  }

  // Keeps an object alive until the step is over: others may run Python code in the meantime.
  void hold(PyObject* object) {
    Py_INCREF(object);
    held_.push_back(object);
  }

  TensorReader::Reach read(PyObject* object, Stream stream, TensorView& view) {
    try {
      return reader().read(object, seen_, view);
    } catch (const py::type_error& error) {
      fail(PyExc_TypeError, params_.size() - 1, stream, error.what());
    }
  }

  template <typename Call>
  void explain(Call call) {
    try {
      call();
    } catch (const RowError& error) {
      fail(PyExc_ValueError, error.row, error.stream, error.what());
    }
  }

  // Raises RowError(type of the exception to raise, parameter, stream, message) in Python.
  [[noreturn]] void fail(PyObject* type, size_t row, Stream stream, const char* message) {
    const auto fields =
        py::make_tuple(py::handle(type), py::handle(params_.at(row)), int(stream), message);
    PyErr_SetObject(row_error, fields.ptr());
    throw py::error_already_set();
  }

  Plan plan_;
  SeenTensors seen_;
  DictWalk state_walk_, shadow_walk_;
  TensorView views_[kStreams];  // of the row that is being added
  std::vector<TensorView> more_shadows_;
  std::vector<PyObject*> held_;    // references that the plan owns
  std::vector<PyObject*> params_;  // of every row
  std::vector<PyObject*> written_;
  size_t runs_ = 0;          // since it was cleared
  bool is_running_ = false;  // without the GIL
  size_t shadowed_ = 0;      // rows with a shadow that the kernels update
  bool has_lone_grads_ = false;
  PyObject* frozen_ = nullptr;  // a set that the plan holds; null for an empty one
};

Group make_group(double lr, double momentum, double dampening, double weight_decay,
                 double grad_scale, bool nesterov, bool maximize, bool decoupled_weight_decay,
                 bool sutskever, bool reset_grads, int tensors,
                 std::optional<std::pair<uint64_t, uint64_t>> rounding) {
  Group group;
  group.sgd.lr = lr;
  group.sgd.momentum = momentum;
  group.sgd.dampening = dampening;
  group.sgd.weight_decay = weight_decay;
  group.sgd.grad_scale = grad_scale;
  group.sgd.nesterov = nesterov;
  group.sgd.maximize = maximize;
  group.sgd.decoupled_weight_decay = decoupled_weight_decay;
  group.sgd.formulation = sutskever ? Formulation::kSutskever : Formulation::kTorch;
  group.reset_grads = reset_grads;
  group.tensors = tensors;
  if (rounding) group.rounding = {true, rounding->first, rounding->second};
  return group;
}

// The rows of a differentiable pass, one list for each stream; None for a list, or in one, where it
// is absent. Streams from `trusted` on are known to be plain memory.
Pass::Fit add_rows(Pass& pass, const py::list& streams, const py::object& hyper_of,
                   size_t trusted) {
  std::vector<std::pair<PyObject*, int>> lists;  // those that are there, with their stream
  size_t count = 0;
  require_list(hyper_of.ptr());
  for (size_t s = 0; s < streams.size() && s < size_t(kPassStreams); ++s) {
    PyObject* const list = PyList_GET_ITEM(streams.ptr(), s);
    require_list(list);
    if (list == Py_None) continue;
    const size_t length = PyList_GET_SIZE(list);
    if (!lists.empty() && length != count) throw py::value_error("expected lists of one length");
    count = length;
    lists.emplace_back(list, int(s));
  }
  TensorView views[kPassStreams];
  auto fit = Pass::Fit::kKernels;
  for (size_t i = 0; i < count; ++i) {
    const TensorView* row[kPassStreams] = {};
    for (const auto& [list, s] : lists) {
      PyObject* const tensor = entry_at(list, i);
      if (tensor == Py_None) continue;
      const bool is_trusted = size_t(s) >= trusted;
      if (reader().read_once(tensor, is_trusted, views[s]) == TensorReader::Reach::kTorch) {
        return Pass::Fit::kTorch;
      }
      row[s] = &views[s];
    }
    const uint32_t hyper =
        hyper_of.is_none() ? 0 : py::handle(entry_at(hyper_of.ptr(), i)).cast<uint32_t>();
    fit = std::max(fit, pass.add_row(row, hyper));
    if (fit == Pass::Fit::kTorch) break;
  }
  return fit;
}

// Takes a number, or a tensor of one that is read where the pass runs. False if it is out of reach.
bool read_number(PyObject* object, int device, double& number, DeviceScalar& scalar) {
  if (PyFloat_Check(object) || PyLong_Check(object)) {
    number = PyFloat_AsDouble(object);
    if (PyErr_Occurred()) throw py::error_already_set();  // an integer that is too large
    return true;
  }
  TensorView view;
  if (reader().read_once(object, false, view) == TensorReader::Reach::kTorch) return false;
  const bool is_double = view.dtype == DType::kFloat64;
  if (!view.has_kernels || view.numel != 1 || !(is_double || view.dtype == DType::kFloat32)) {
    return false;
  }
  scalar = {view.data, is_double};
  if (view.device == device) return true;
  if (view.device != kCpu) return false;
  scalar.read_into(number);
  scalar = {};
  return true;
}

// Takes tuples of kPassSums numbers or tensors and whether there is no momentum.
bool add_hypers(Pass& pass, const py::list& hypers, bool nesterov, bool maximize) {
  for (const py::handle entry : hypers) {
    if (!py::isinstance<py::tuple>(entry)) throw py::type_error("expected a tuple of five fields");
    const auto fields = py::reinterpret_borrow<py::tuple>(entry);
    if (fields.size() != size_t(kPassSums) + 1) throw py::value_error("expected five fields");
    PassHyper hyper;
    hyper.nesterov = nesterov;
    hyper.maximize = maximize;
    hyper.plain = fields[kPassSums].ptr() == Py_True;
    for (int k = 0; k < kPassSums; ++k) {
      PyObject* const number = fields[k].ptr();
      if (!read_number(number, pass.device(), hyper.numbers[k], hyper.scalars[k])) return false;
    }
    pass.add_hyper(hyper);
  }
  return true;
}

// Whether the kernels can run the forward pass of these tensors, as the number of a Pass::Fit; the
// device, and the chunks of all rows.
py::tuple fit_pass(const py::list& streams, const py::list& hypers) {
  Pass pass(PassKind::kSgd);
  auto fit = add_rows(pass, streams, py::none(), kPassStreams);
  if (fit != Pass::Fit::kTorch && !add_hypers(pass, hypers, false, false)) fit = Pass::Fit::kTorch;
  return py::make_tuple(int(fit), pass.device(), pass.chunks());
}

// Runs a pass, or returns false where the tensors are not in one order of elements or out of reach;
// nothing has been written then. With `sums`, an address on the device, writes what PassList says
// there.
bool run_pass(int kind, const py::list& streams, const py::object& hyper_of, const py::list& hypers,
              bool nesterov, bool maximize, size_t trusted, int threads, uintptr_t sums) {
  if (kind < 0 || kind > int(PassKind::kEmaBackward)) {
    throw py::value_error("expected a kind of pass");
  }
  Pass pass{PassKind(kind)};
  if (add_rows(pass, streams, hyper_of, trusted) != Pass::Fit::kKernels) return false;
  if (!add_hypers(pass, hypers, nesterov, maximize)) return false;
  const PassList& list = pass.finish();
  for (const PassRow& row : list.rows) {
    if (row.hyper >= list.hypers.size()) throw py::value_error("expected the index of a hyper");
  }
  double* const results = reinterpret_cast<double*>(sums);
  if (pass.device() == kCpu) {
    const ReleasedGil released;
    cpu::run_pass(list, threads, results);
    return true;
  }
#if FUSED_OPT_WITH_CUDA
  void* stream = reader().current_stream(pass.device());
  const ReleasedGil released;
  cuda::run_pass(list, pass.device(), stream, results);
  return true;
#else
  return false;
#endif
}

double evaluate_schedule(int kind, const std::vector<double>& parameters, int64_t k) {
  if (k < 0) throw py::value_error("evaluate_schedule: expected k >= 0");
  return rules::evaluate(make_schedule(kind, parameters), k);
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> items;
  std::istringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
  return items;
}

}  // namespace
}  // namespace fused_opt

PYBIND11_MODULE(_C, module) {
  using namespace fused_opt;
  register_errors(module);

  module.attr("version") = FUSED_OPT_VERSION;
  module.attr("cuda_version") =
      FUSED_OPT_WITH_CUDA ? py::object(py::str(FUSED_OPT_CUDA_VERSION)) : py::object(py::none());
  module.attr("cuda_archs") = split(FUSED_OPT_CUDA_ARCHS);
  module.attr("ptx_archs") = split(FUSED_OPT_PTX_ARCHS);
  module.attr("chunk_elements") = cuda::kChunkElements;
  module.attr("table_averages") = cuda::kTableAverages;
  module.attr("norm_chunk_elements") = rules::kSumChunk;
  module.attr("norm_lanes") = rules::kLanes<float>;
#if FUSED_OPT_WITH_CUDA
  module.def("memory_bytes", py::overload_cast<int>(cuda::memory_bytes));
#else
  module.def("memory_bytes", [](int) { return 0; });
#endif
  module.def("cpu_isa", cpu::isa_level);
  module.def("cpu_isas", cpu::isa_levels);
  module.def("set_cpu_isa", cpu::set_isa_level);
  module.def("evaluate_schedule", evaluate_schedule);
  module.def("fit_pass", fit_pass);
  module.def("run_pass", run_pass);
  module.attr("pass_sums") = kPassSums;

  py::class_<Group>(module, "Group", py::module_local())
      .def(py::init(&make_group), py::kw_only(), py::arg("lr") = 0, py::arg("momentum") = 0,
           py::arg("dampening") = 0, py::arg("weight_decay") = 0, py::arg("grad_scale") = 1,
           py::arg("nesterov") = false, py::arg("maximize") = false,
           py::arg("decoupled_weight_decay") = false, py::arg("sutskever") = false,
           py::arg("reset_grads") = false, py::arg("tensors") = -1,
           py::arg("rounding") = py::none());

  py::class_<ClipHyper>(module, "ClipHyper", py::module_local())
      .def(py::init([](double max_norm, double grad_scale, bool infinity) {
             return ClipHyper{max_norm, grad_scale, infinity};
           }),
           py::kw_only(), py::arg("max_norm") = 0, py::arg("grad_scale") = 1,
           py::arg("infinity") = false)
      .def("set_max_norm",
           [](ClipHyper& hyper, uintptr_t address, bool is_double) {
             hyper.max_norm_scalar = {reinterpret_cast<const void*>(address), is_double};
           })
      .def("set_grad_scale", [](ClipHyper& hyper, uintptr_t address, bool is_double) {
        hyper.grad_scale_scalar = {reinterpret_cast<const void*>(address), is_double};
      });

  py::class_<HostJob>(module, "HostJob", py::module_local())
      .def("add_copy", &HostJob::add_copy)
      .def("run", &HostJob::run, py::call_guard<ReleasedGil>())
      .def("enqueue", &HostJob::enqueue);

  py::class_<PyPlan>(module, "Plan", py::module_local())
      .def(py::init())
      .def("clear", &PyPlan::clear)
      .def("set_averages", &PyPlan::set_averages)
      .def("set_frozen", &PyPlan::set_frozen)
      .def("set_schedule", &PyPlan::set_schedule)
      .def("add_param_group", &PyPlan::add_param_group)
      .def("add", &PyPlan::add)
      .def("add_grads", &PyPlan::add_grads)
      .def("untouched", &PyPlan::untouched)
      .def("check", &PyPlan::check)
      .def("written", &PyPlan::written)
      .def("devices", &PyPlan::devices)
      .def("norm_chunks", &PyPlan::norm_chunks)
      .def("grad_norm", &PyPlan::grad_norm)
      .def("scale_grads", &PyPlan::scale_grads)
      .def("set_scalar", &PyPlan::set_scalar)
      .def("set_decay", &PyPlan::set_decay)
      .def("set_average_steps", &PyPlan::set_average_steps)
      .def("set_rounding_steps", &PyPlan::set_rounding_steps)
      .def("set_gate", &PyPlan::set_gate)
      .def("memory_bytes", &PyPlan::memory_bytes)
      .def("host_job", &PyPlan::host_job)
      .def("run", &PyPlan::run)
      .def("has_run", &PyPlan::has_run);
}
