// Reads torch tensors from Python objects: what they point to, and whether our kernels may touch
// them. Part of the binding; knows Python and torch's Python surface, links neither torch nor c10.
#pragma once

#include <Python.h>

#include <array>
#include <vector>

#include "dlpack.h"
#include "tensor_view.h"

namespace fused_opt {

// The objects whose plain memory is known to be their value. Torch can hang a negation on a view
// (`x.conj().imag`) without changing its memory, and asking costs more than reading the tensor:
// so each object is asked once, and remembered by place and weak reference.
class SeenTensors {
 public:
  ~SeenTensors() { clear(); }
  // Starts over at the first place.
  void rewind() { next_ = 0; }
  // Whether the tensor was at this place before; moves to the next place.
  bool advance(PyObject* tensor);
  // Remembers it at the place just passed.
  void remember(PyObject* tensor);
  void clear();

 private:
  std::vector<PyObject*> references_;
  size_t next_ = 0;
};

class TensorReader {
 public:
  // Where a tensor can be updated.
  enum class Reach { kKernels, kTorch };

  // Imports torch.
  TensorReader();

  // Describes a tensor. kTorch: the object is a tensor, but of a kind that has no plain memory
  // (sparse, a subclass with a dispatcher of its own, a device that is neither cpu nor cuda), and
  // the view is not filled. Throws pybind11::type_error if it is no tensor.
  Reach read(PyObject* object, SeenTensors& seen, TensorView& view);

  // The same for an object that is not remembered. With `trusted` its memory is known to be its
  // value, and it is not asked.
  Reach read_once(PyObject* object, bool trusted, TensorView& view);

  // The stream that torch runs the device's work on.
  void* current_stream(int device);

 private:
  Reach describe(PyObject* object, TensorView& view);
  bool is_plain(PyObject* object);
  bool plain_type(PyTypeObject* type);
  bool negated(PyObject* object) const;
  bool read_dlpack(PyObject* object, TensorView& view) const;
  bool read_attributes(PyObject* object, TensorView& view);

  const dlpack::ExchangeApi* api_ = nullptr;  // null: torch's table is of another version
  PyObject* tensor_type_;
  PyObject* no_dispatch_;                   // what a type without a dispatcher inherits
  std::vector<PyTypeObject*> plain_types_;  // held, so that the addresses stay theirs

  // Shapes and strides that read_attributes lends out, for as many tensors as a row has.
  struct Lent {
    std::vector<int64_t> shape, strides;
  };
  std::array<Lent, kStreams + kMaxAverages - 1> lent_;
  size_t next_lent_ = 0;
};

}  // namespace fused_opt
