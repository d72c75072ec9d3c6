// The part of DLPack 1.x that is used here: a table of C functions through which a framework shows
// its tensors without building Python objects. Declared from the specification
// (https://dmlc.github.io/dlpack/latest/c_api.html).
#pragma once

#include <cstdint>

namespace fused_opt::dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4, kComplex = 5, kBool = 6 };

struct Device {
  int32_t type;
  int32_t index;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  // Functions that are not called here.
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Both return 0, or -1 with a Python exception set.
  int (*tensor_from_py_object)(void* py_object, Tensor* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_index, void** out);
};

}  // namespace fused_opt::dlpack
