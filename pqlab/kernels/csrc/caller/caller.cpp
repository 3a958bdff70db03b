// Repeats calls of `ops.decode` and `ops.step_` that are like an earlier one: looks at the tensors of the call, makes
// those of the results, and hands the addresses to the C functions of a backend (kernels/caller.py).
//
// The kernels know nothing of torch; this does, and is a library of its own, so that a torch that it does not fit takes
// nothing else away. torch/csrc/autograd/python_variable.h would say what an object of torch.Tensor is, and brings
// pybind11 and ten seconds of compiling. What is needed of it is one function, without which this library does not load,
// and the place of the tensor in its object, which `set_up` finds.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/core/TensorBase.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <optional>
#include <vector>

PyObject* THPVariable_Wrap(const at::TensorBase& tensor);  // a new reference, of libtorch_python

namespace {

// -- objects of torch.Tensor ------------------------------------------------------------------------------------------

size_t tensor_place;  // in bytes, within the object

const at::TensorBase& tensor_of(PyObject* object) { return *(const at::TensorBase*)((char*)object + tensor_place); }

// set_up(tensor, address): finds the place by an ordinary tensor and its `_cdata`.
PyObject* set_up(PyObject*, PyObject* args) {
    PyObject* object;
    unsigned long long address;
    if (!PyArg_ParseTuple(args, "OK", &object, &address)) return nullptr;
    // Right behind the head; up to torch 2.9 and a little further, behind a flag there that says who owns it.
    for (const size_t place : {sizeof(PyObject), sizeof(PyObject) + sizeof(void*)}) {
        if (Py_TYPE(object)->tp_basicsize < Py_ssize_t(place + sizeof(void*))) break;
        if (*(void**)((char*)object + place) != (void*)address) continue;
        tensor_place = place;
        Py_RETURN_NONE;
    }
    PyErr_SetString(PyExc_ImportError, "this torch keeps a tensor in its Python object in a way that is not known");
    return nullptr;
}

static_assert(sizeof(at::TensorBase) == sizeof(void*), "a tensor is a pointer to its implementation");

// -- calls ------------------------------------------------------------------------------------------------------------

// Where the arguments of an operation of kernels/ops.py stand.
struct Places {
    Py_ssize_t count, q, page_table, lengths, scale, span;
    Py_ssize_t k, v, before;       // of a step; else negative
    std::vector<Py_ssize_t> held;  // tensors that stay from call to call, the codebooks first
};

const Places DECODE{16, 0, 3, 4, 13, 14, -1, -1, -1, {5, 6, 1, 2, 7, 8, 9, 10}};
const Places STEP{25, 15, 8, 10, 16, 24, 6, 7, 9, {11, 12, 0, 1, 2, 3, 4, 5, 17, 18, 19, 20, 21, 22, 23}};

// What differs from call to call, in the order of `caller.ADDRESSES`.
enum Address { Q, PAGE_TABLE, LENGTHS, OUT, LSE, K, V, BEFORE, ADDRESSES };
using Addresses = std::array<const void*, ADDRESSES>;

constexpr size_t MOST_PARAMS = 512;  // bytes

using Shape = std::array<int64_t, 4>;

int64_t version_of(const at::TensorBase& x) { return x.unsafeGetTensorImpl()->version_counter().current_version(); }

// A function of C and its parameters, which are the same at every call but for some addresses in them.
struct Launch {
    void* function;
    std::vector<char> params;
    std::array<Py_ssize_t, ADDRESSES> offsets;  // of those addresses; negative: not among them

    // Whether it did what was asked. On a stream, the function says otherwise by a message, else by a number.
    bool run(const Addresses& addresses, bool on_stream, void* stream) const {
        alignas(16) char room[MOST_PARAMS];
        std::memcpy(room, params.data(), params.size());
        for (size_t i = 0; i < ADDRESSES; i++)
            if (offsets[i] >= 0) std::memcpy(room + offsets[i], &addresses[i], sizeof(void*));
        if (on_stream) return ((const char* (*)(const void*, void*))function)(room, stream) == nullptr;
        return ((int (*)(const void*))function)(room) == 0;
    }
};

// What calls have in common.
struct Known {
    struct HeldTensor {
        PyObject* object;  // not owned: valid while `held` is alive; None for a map or a fit that is not there
        const void* address;
        int64_t version;  // -1: not compared
    };

    const Places* places;
    std::vector<Launch> launches;
    PyObject* held;  // has the attribute `alive`
    PyTypeObject* tensor_type;
    at::Device device = at::kCPU;
    at::ScalarType dtype;
    Shape q_shape, new_shape;
    std::array<int64_t, 2> table_shape;
    double scale;
    long span;
    bool on_stream = false;
    void* stream = nullptr;
    int (*is_capturing)(void* stream) = nullptr;
    std::vector<HeldTensor> tensors;

    ~Known() { Py_XDECREF(held); }

    bool is_alive() const {
        static PyObject* const name = PyUnicode_InternFromString("alive");
        PyObject* alive = PyObject_GetAttr(held, name);
        Py_XDECREF(alive);
        return alive == Py_True;
    }

    // Memory that launches use beside the tensors is that of one stream, and never that of a graph.
    bool is_on_its_stream() const {
        const c10::Stream current = c10::impl::VirtualGuardImpl(device.type()).getStream(device);
        return current.native_handle() == stream && !is_capturing(stream);
    }

    bool holds(PyObject* const* args) const {
        for (size_t i = 0; i < tensors.size(); i++) {
            const HeldTensor& known = tensors[i];
            if (args[places->held[i]] != known.object) return false;
            if (known.object == Py_None) continue;
            const at::TensorBase& x = tensor_of(known.object);
            if (x.const_data_ptr() != known.address) return false;
            if (known.version >= 0 && version_of(x) != known.version) return false;
        }
        return true;
    }

    // The address of a contiguous tensor of this dtype and shape on the device, else null.
    const void* address(PyObject* object, at::ScalarType wanted, at::IntArrayRef shape) const {
        if (Py_TYPE(object) != tensor_type) return nullptr;
        const at::TensorBase& x = tensor_of(object);
        const bool fits = x.scalar_type() == wanted && x.device() == device && x.sizes() == shape && x.is_contiguous();
        return fits ? x.const_data_ptr() : nullptr;
    }

    const void* vectors(PyObject* object, const Shape& shape) const {
        const void* found = address(object, dtype, shape);
        return on_stream && (uintptr_t)found % 16 ? nullptr : found;  // a GPU reads several at a time
    }

    const void* lengths(PyObject* object) const { return address(object, at::kInt, {q_shape[0], 3}); }

    at::TensorBase empty(at::IntArrayRef shape, at::ScalarType wanted, const at::TensorBase& like) const {
        if (device.is_cpu()) return at::detail::empty_cpu(shape, wanted);
        c10::Allocator* const allocator = like.storage().allocator();  // that of every tensor of the device
        TORCH_CHECK(allocator, "memory of another library");
        return at::detail::empty_generic(shape, allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA), wanted,
                                         std::nullopt);
    }
};

// Whether something stands between a call and its operations: a mode, a transformation, a trace.
bool is_intercepted() {
    return !(c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

// Results as a tuple; null without an error set: the call is not like the known one, or a launch wants more.
PyObject* repeated(const Known& known, PyObject* const* args, Py_ssize_t count) {
    const Places& at = *known.places;
    if (count != at.count || is_intercepted() || !known.is_alive() || !known.holds(args)) return nullptr;
    Addresses given{};
    given[Q] = known.vectors(args[at.q], known.q_shape);
    given[LENGTHS] = known.lengths(args[at.lengths]);
    given[PAGE_TABLE] = known.address(args[at.page_table], at::kInt, known.table_shape);
    if (!given[Q] || !given[LENGTHS] || !given[PAGE_TABLE]) return nullptr;
    if (at.k >= 0) {
        given[K] = known.vectors(args[at.k], known.new_shape);
        given[V] = known.vectors(args[at.v], known.new_shape);
        given[BEFORE] = known.lengths(args[at.before]);
        if (!given[K] || !given[V] || !given[BEFORE]) return nullptr;
    }
    const double scale = PyFloat_AsDouble(args[at.scale]);
    const long span = PyLong_AsLong(args[at.span]);
    if (PyErr_Occurred() || scale != known.scale || span != known.span) return nullptr;
    std::optional<c10::DeviceGuard> guard;
    if (known.on_stream) {
        guard.emplace(known.device);
        if (!known.is_on_its_stream()) return nullptr;
    }
    const at::IntArrayRef shape(known.q_shape);
    const at::TensorBase& q = tensor_of(args[at.q]);
    const at::TensorBase out = known.empty(shape, known.dtype, q), lse = known.empty(shape.slice(0, 3), at::kFloat, q);
    given[OUT] = out.mutable_data_ptr();
    given[LSE] = lse.mutable_data_ptr();
    bool done;
    Py_BEGIN_ALLOW_THREADS
    done = std::all_of(known.launches.begin(), known.launches.end(), [&](const Launch& launch) {
        return launch.run(given, known.on_stream, known.stream);
    });
    Py_END_ALLOW_THREADS
    if (!done) return nullptr;
    return Py_BuildValue("NN", THPVariable_Wrap(out), THPVariable_Wrap(lse));
}

constexpr const char* KNOWN = "pqlab.Known";

Known* known_of(PyObject* capsule) { return (Known*)PyCapsule_GetPointer(capsule, KNOWN); }

// A call with all arguments of the operation, by position. None: it is to be checked, which also finds any error again.
PyObject* again(PyObject* capsule, PyObject* const* args, Py_ssize_t count) {
    PyObject* results = nullptr;
    try {
        results = repeated(*known_of(capsule), args, count);
    } catch (const std::exception&) {
    }
    if (results) return results;
    PyErr_Clear();
    Py_RETURN_NONE;
}

PyMethodDef again_method{"again", (PyCFunction)(void (*)())again, METH_FASTCALL, nullptr};

// A member of launches: (address of the function, its parameters, offsets of `Address`), see `caller.Launch`.
bool add_launch(Known& known, PyObject* given) {
    Launch& launch = known.launches.emplace_back();
    unsigned long long function;
    const char* params;
    Py_ssize_t bytes;
    auto& at = launch.offsets;
    if (!PyArg_ParseTuple(given, "Ky#(nnnnnnnn)", &function, &params, &bytes, &at[Q], &at[PAGE_TABLE], &at[LENGTHS],
                          &at[OUT], &at[LSE], &at[K], &at[V], &at[BEFORE]))
        return false;
    const bool fits = std::all_of(at.begin(), at.end(), [&](Py_ssize_t o) { return o + Py_ssize_t(sizeof(void*)) <= bytes; });
    if (!fits || size_t(bytes) > MOST_PARAMS) {
        PyErr_SetString(PyExc_ValueError, "parameters of a launch do not fit");
        return false;
    }
    launch.function = (void*)function;
    launch.params.assign(params, params + bytes);
    return true;
}

// repeat(op, args, held, versions, launches, stream): the function `again` for calls like this one.
//
// op: "decode" or "step_"; args: a tuple of its arguments, which have been checked; held: lives as long as the tensors
// among them that stay, or says that they do not; versions: of the codebooks; launches: of one call, in turn; stream:
// (its handle, the address of a function that says whether it is captured), or None where functions take none.
PyObject* repeat(PyObject*, PyObject* given) try {
    const char* op;
    PyObject *args, *held, *launches, *stream;
    long long versions[2];
    if (!PyArg_ParseTuple(given, "sO!O(LL)O!O", &op, &PyTuple_Type, &args, &held, &versions[0], &versions[1], &PyTuple_Type,
                          &launches, &stream))
        return nullptr;
    const Places& at = std::strcmp(op, "decode") ? STEP : DECODE;
    if (PyTuple_GET_SIZE(args) != at.count) return PyErr_Format(PyExc_ValueError, "arguments of %s do not fit", op);
    auto known = std::make_unique<Known>();
    known->places = &at;
    known->held = Py_NewRef(held);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(launches); i++)
        if (!add_launch(*known, PyTuple_GET_ITEM(launches, i))) return nullptr;
    if (stream != Py_None) {
        unsigned long long handle, is_capturing;
        if (!PyArg_ParseTuple(stream, "KK", &handle, &is_capturing)) return nullptr;
        known->on_stream = true;
        known->stream = (void*)handle;
        known->is_capturing = (int (*)(void*))is_capturing;
    }
    PyObject* const q = PyTuple_GET_ITEM(args, at.q);
    known->tensor_type = Py_TYPE(q);
    known->device = tensor_of(q).device();
    known->dtype = tensor_of(q).scalar_type();
    const auto shape_of = [](PyObject* object, auto& shape) {
        const at::IntArrayRef sizes = tensor_of(object).sizes();
        if (sizes.size() == shape.size()) std::copy(sizes.begin(), sizes.end(), shape.begin());
        return sizes.size() == shape.size();
    };
    if (!shape_of(q, known->q_shape) || !shape_of(PyTuple_GET_ITEM(args, at.page_table), known->table_shape) ||
        (at.k >= 0 && !shape_of(PyTuple_GET_ITEM(args, at.k), known->new_shape)))
        return PyErr_Format(PyExc_ValueError, "tensors of %s have other dimensions", op);
    known->scale = PyFloat_AsDouble(PyTuple_GET_ITEM(args, at.scale));
    known->span = PyLong_AsLong(PyTuple_GET_ITEM(args, at.span));
    if (PyErr_Occurred()) return nullptr;
    for (const Py_ssize_t place : at.held) {
        PyObject* object = PyTuple_GET_ITEM(args, place);
        const void* address = object == Py_None ? nullptr : tensor_of(object).const_data_ptr();
        const size_t i = known->tensors.size();
        known->tensors.push_back({object, address, i < 2 ? versions[i] : -1});
    }
    PyObject* capsule = PyCapsule_New(known.get(), KNOWN, [](PyObject* self) { delete known_of(self); });
    if (!capsule) return nullptr;
    known.release();
    PyObject* function = PyCFunction_New(&again_method, capsule);
    Py_DECREF(capsule);
    return function;
} catch (const std::exception& error) {
    return PyErr_Format(PyExc_RuntimeError, "%s", error.what());
}

PyMethodDef methods[] = {
    {"set_up", set_up, METH_VARARGS, nullptr}, {"repeat", repeat, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "pqlab_caller", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_pqlab_caller() { return PyModule_Create(&definition); }
