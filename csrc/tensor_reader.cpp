#include "tensor_reader.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

namespace py = pybind11;

namespace fused_opt {
namespace {

// Our dtype for a DLPack one, if there is any.
bool find_dtype(dlpack::DataType type, DType& dtype) {
  const bool is_float = type.code == dlpack::kFloat;
  if (is_float && type.bits == 32) return dtype = DType::kFloat32, true;
  if (is_float && type.bits == 64) return dtype = DType::kFloat64, true;
  if (is_float && type.bits == 16) return dtype = DType::kFloat16, true;
  if (type.code == dlpack::kBfloat && type.bits == 16) return dtype = DType::kBFloat16, true;
  if (type.code == dlpack::kInt && type.bits == 16) return dtype = DType::kInt16, true;
  return false;
}

// The same for the name of a torch dtype.
bool find_dtype(const std::string& name, DType& dtype) {
  constexpr const char* kNames[kDTypes] = {"torch.float32", "torch.float64", "torch.bfloat16",
                                           "torch.float16", "torch.int16"};
  for (int i = 0; i < kDTypes; ++i) {
    if (name == kNames[i]) return dtype = DType(i), true;
  }
  return false;
}

const char* kind_of(uint8_t code) {
  switch (code) {
    case dlpack::kInt:
      return "int";
    case dlpack::kUInt:
      return "uint";
    case dlpack::kComplex:
      return "complex";
    case dlpack::kBool:
      return "bool";
    default:
      return "float";
  }
}

const char* kind_of(const std::string& name) {
  for (const char* kind : {"uint", "int", "complex", "bool"}) {
    if (name.rfind(std::string("torch.") + kind, 0) == 0) return kind;
  }
  return "float";
}

}  // namespace

bool SeenTensors::advance(PyObject* tensor) {
  const size_t place = next_++;
  if (place >= references_.size()) references_.resize(place + 1, nullptr);
  PyObject* reference = references_[place];
  return reference != nullptr && PyWeakref_GET_OBJECT(reference) == tensor;
}

void SeenTensors::remember(PyObject* tensor) {
  PyObject*& reference = references_[next_ - 1];
  Py_XDECREF(reference);
  reference = PyWeakref_NewRef(tensor, nullptr);
  if (reference == nullptr) PyErr_Clear();  // not remembered, asked again next time
}

void SeenTensors::clear() {
  for (PyObject* reference : references_) Py_XDECREF(reference);
  references_.clear();
  next_ = 0;
}

TensorReader::TensorReader() {
  const py::module_ torch = py::module_::import("torch");
  tensor_type_ = py::object(torch.attr("Tensor")).release().ptr();
  no_dispatch_ = py::object(torch.attr("_C").attr("_disabled_torch_dispatch_impl")).release().ptr();
  const py::object capsule = py::getattr(tensor_type_, "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), dlpack::kCapsuleName)) {
    api_ = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsuleName));
    while (api_ != nullptr && api_->version.major != dlpack::kMajorVersion) api_ = api_->previous;
  }
}

TensorReader::Reach TensorReader::read(PyObject* object, SeenTensors& seen, TensorView& view) {
  const bool was_seen = seen.advance(object);
  if (!is_plain(object)) return Reach::kTorch;
  if (!was_seen) {
    if (negated(object)) return Reach::kTorch;
    seen.remember(object);
  }
  return describe(object, view);
}

TensorReader::Reach TensorReader::read_once(PyObject* object, bool trusted, TensorView& view) {
  if (!is_plain(object) || (!trusted && negated(object))) return Reach::kTorch;
  return describe(object, view);
}

TensorReader::Reach TensorReader::describe(PyObject* object, TensorView& view) {
  const bool described =
      api_ != nullptr ? read_dlpack(object, view) : read_attributes(object, view);
  // Wrappers and freed storages show elements without memory.
  if (!described || (view.data == nullptr && view.numel > 0)) return Reach::kTorch;
  return Reach::kKernels;
}

// Whether the type of a tensor has no dispatcher of its own. Throws if the object is no tensor.
bool TensorReader::is_plain(PyObject* object) {
  if (plain_type(Py_TYPE(object))) return true;
  const int is_tensor = PyObject_IsInstance(object, tensor_type_);
  if (is_tensor < 0) throw py::error_already_set();  // Python code of torch's runs there: Ctrl-C
  if (is_tensor != 0) return false;
  throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object)->tp_name);
}

bool TensorReader::plain_type(PyTypeObject* type) {
  for (const PyTypeObject* known : plain_types_) {
    if (known == type) return true;
  }
  if (!PyType_IsSubtype(type, reinterpret_cast<PyTypeObject*>(tensor_type_))) return false;
  const py::object dispatch =
      py::getattr(reinterpret_cast<PyObject*>(type), "__torch_dispatch__", py::none());
  if (dispatch.ptr() != no_dispatch_) return false;
  Py_INCREF(type);
  plain_types_.push_back(type);
  return true;
}

bool TensorReader::negated(PyObject* object) const {
  static PyObject* const name = PyUnicode_InternFromString("is_neg");
  const auto answer = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, name));
  if (!answer) throw py::error_already_set();  // the method of a subclass raised
  return answer.ptr() != Py_False;
}

bool TensorReader::read_dlpack(PyObject* object, TensorView& view) const {
  dlpack::Tensor tensor;
  if (api_->tensor_from_py_object(object, &tensor) != 0) {
    PyErr_Clear();
    return false;
  }
  switch (tensor.device.type) {
    case dlpack::kCpu:
    case dlpack::kCudaHost:
      view.device = kCpu;
      break;
    case dlpack::kCuda:
      view.device = tensor.device.index;
      break;
    default:
      return false;
  }
  view.data =
      tensor.data == nullptr ? nullptr : static_cast<char*>(tensor.data) + tensor.byte_offset;
  view.ndim = tensor.ndim;
  view.shape = tensor.shape;
  view.strides = tensor.strides;
  view.numel = 1;
  for (int d = 0; d < tensor.ndim; ++d) view.numel *= tensor.shape[d];
  view.item_bytes = tensor.dtype.bits / 8;
  view.has_kernels = find_dtype(tensor.dtype, view.dtype);
  if (!view.has_kernels) view.dtype_kind = kind_of(tensor.dtype.code);
  return true;
}

// The same through Python attributes, several times slower.
bool TensorReader::read_attributes(PyObject* object, TensorView& view) {
  const py::handle tensor(object);
  const auto device = py::str(tensor.attr("device").attr("type")).cast<std::string>();
  const auto layout = py::str(tensor.attr("layout")).cast<std::string>();
  if (layout != "torch.strided" || (device != "cpu" && device != "cuda")) return false;
  view.device = device == "cpu" ? kCpu : tensor.attr("device").attr("index").cast<int>();
  view.data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
  view.numel = tensor.attr("numel")().cast<int64_t>();
  Lent& lent = lent_[next_lent_++ % lent_.size()];
  lent.shape = py::list(tensor.attr("shape")).cast<std::vector<int64_t>>();
  lent.strides = py::list(tensor.attr("stride")()).cast<std::vector<int64_t>>();
  view.ndim = int(lent.shape.size());
  view.shape = lent.shape.data();
  view.strides = lent.strides.data();
  view.item_bytes = tensor.attr("element_size")().cast<int>();
  const auto dtype = py::str(tensor.attr("dtype")).cast<std::string>();
  view.has_kernels = find_dtype(dtype, view.dtype);
  if (!view.has_kernels) view.dtype_kind = kind_of(dtype);
  return true;
}

void* TensorReader::current_stream(int device) {
  if (api_ != nullptr) {
    void* stream = nullptr;
    if (api_->current_work_stream(dlpack::kCuda, device, &stream) != 0)
      throw py::error_already_set();
    return stream;
  }
  const py::object cuda = py::module_::import("torch").attr("cuda");
  return reinterpret_cast<void*>(
      cuda.attr("current_stream")(device).attr("cuda_stream").cast<uintptr_t>());
}

}  // namespace fused_opt
