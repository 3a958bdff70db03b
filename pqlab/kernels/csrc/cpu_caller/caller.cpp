// Calls `pq_decode` (../cpu/api.h) with the tensors of a call of `ops.decode` or `ops.step_` that is like an earlier
// one: what kernels/cpu_again.py does, in a tenth of the time.
//
// The kernels know nothing of torch; this does, and is a library of its own, so that a torch that it does not fit takes
// nothing else away. torch/csrc/autograd/python_variable.h would say what an object of torch.Tensor is, and brings
// pybind11 and ten seconds of compiling. What is needed of it is one function, without which this library does not load,
// and the place of the tensor in its object, which `set_up` finds.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/core/TensorBase.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "../cpu/api.h"

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
    Py_ssize_t count, q, page_table, lengths, scale;
    Py_ssize_t k, v, before;       // of a step; else negative
    std::vector<Py_ssize_t> held;  // tensors that stay from call to call, the codebooks first
};

const Places DECODE{14, 0, 3, 4, 13, -1, -1, -1, {5, 6, 1, 2, 7, 8, 9, 10}};
const Places STEP{21, 15, 8, 10, 16, 6, 7, 9, {11, 12, 0, 1, 2, 3, 4, 5, 17, 18, 19, 20}};

using Shape = std::array<int64_t, 4>;

int64_t version_of(const at::TensorBase& x) { return x.unsafeGetTensorImpl()->version_counter().current_version(); }

// What calls have in common.
struct Known {
    struct HeldTensor {
        PyObject* object;  // not owned: valid while `held` is alive; None for a map that is not there
        const void* address;
        int64_t version;  // -1: not compared
    };

    const Places* places;
    int (*kernel)(const pq_decode_args*);
    pq_decode_args call;
    PyObject* held;  // cpu.Held
    PyTypeObject* tensor_type;
    at::ScalarType dtype;
    Shape q_shape, new_shape;
    std::vector<HeldTensor> tensors;

    ~Known() { Py_XDECREF(held); }

    bool is_alive() const {
        static PyObject* const name = PyUnicode_InternFromString("alive");
        PyObject* alive = PyObject_GetAttr(held, name);
        Py_XDECREF(alive);
        return alive == Py_True;
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

    // A contiguous tensor of this dtype on the CPU, else null.
    const at::TensorBase* plain(PyObject* object, at::ScalarType wanted) const {
        if (Py_TYPE(object) != tensor_type) return nullptr;
        const at::TensorBase& x = tensor_of(object);
        return x.scalar_type() == wanted && x.is_cpu() && x.is_contiguous() ? &x : nullptr;
    }

    const void* vectors(PyObject* object, const Shape& shape) const {
        const at::TensorBase* x = plain(object, dtype);
        return x && x->sizes() == at::IntArrayRef(shape) ? x->const_data_ptr() : nullptr;
    }

    const int32_t* lengths(PyObject* object) const {
        const at::TensorBase* x = plain(object, at::kInt);
        return x && x->sizes() == at::IntArrayRef({q_shape[0], 3}) ? (const int32_t*)x->const_data_ptr() : nullptr;
    }
};

// Whether something stands between a call and its operations: a mode, a transformation, a trace.
bool is_intercepted() {
    return !(c10::impl::tls_local_dispatch_key_set().included_ - c10::default_included_set).empty();
}

// Results as a tuple; null without an error set: the call is not like the known one, or the kernel wants more.
PyObject* repeated(const Known& known, PyObject* const* args, Py_ssize_t count) {
    const Places& at = *known.places;
    if (count != at.count || is_intercepted() || !known.is_alive() || !known.holds(args)) return nullptr;
    pq_decode_args call = known.call;
    call.q = known.vectors(args[at.q], known.q_shape);
    call.lengths = known.lengths(args[at.lengths]);
    const at::TensorBase* table = known.plain(args[at.page_table], at::kInt);
    if (!call.q || !call.lengths || !table || table->dim() != 2 || table->size(0) != call.batch) return nullptr;
    call.page_table = (const int32_t*)table->const_data_ptr();
    call.table_width = table->size(1);
    if (at.k >= 0) {
        call.k = known.vectors(args[at.k], known.new_shape);
        call.v = known.vectors(args[at.v], known.new_shape);
        call.before = known.lengths(args[at.before]);
        if (!call.k || !call.v || !call.before) return nullptr;
    }
    call.scale = PyFloat_AsDouble(args[at.scale]);
    if (PyErr_Occurred()) return nullptr;
    const at::IntArrayRef shape(known.q_shape);
    const at::TensorBase out = at::detail::empty_cpu(shape, known.dtype);
    const at::TensorBase lse = at::detail::empty_cpu(shape.slice(0, 3), at::kFloat);
    call.out = out.mutable_data_ptr();
    call.lse = (float*)lse.mutable_data_ptr();
    int result;
    Py_BEGIN_ALLOW_THREADS
    result = known.kernel(&call);
    Py_END_ALLOW_THREADS
    if (result != PQ_OK) return nullptr;
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

// repeat(op, args, held, versions, kernel, packed, dtype): the function `again` for calls like this one.
//
// op: "decode" or "step_"; args: a tuple of its arguments, whose tensors have been checked; held, versions: cpu.Held and
// its versions of the codebooks; kernel: the address of `pq_decode`; packed: the last part of struct pq_decode_args, as
// long as it is; dtype: of enum pq_dtype.
PyObject* repeat(PyObject*, PyObject* given) try {
    const char *op, *packed;
    Py_ssize_t packed_bytes;
    PyObject *args, *held;
    long long versions[2], dtype;
    unsigned long long kernel;
    if (!PyArg_ParseTuple(given, "sO!O(LL)Ky#L", &op, &PyTuple_Type, &args, &held, &versions[0], &versions[1], &kernel,
                          &packed, &packed_bytes, &dtype))
        return nullptr;
    const Places& at = std::strcmp(op, "decode") ? STEP : DECODE;
    const Py_ssize_t held_bytes = sizeof(pq_decode_args) - offsetof(pq_decode_args, k_pages);
    if (PyTuple_GET_SIZE(args) != at.count || packed_bytes != held_bytes)
        return PyErr_Format(PyExc_ValueError, "arguments of %s do not fit", op);
    auto known = std::make_unique<Known>();
    known->places = &at;
    known->kernel = (int (*)(const pq_decode_args*))kernel;
    known->held = Py_NewRef(held);
    PyObject* q = PyTuple_GET_ITEM(args, at.q);
    known->tensor_type = Py_TYPE(q);
    pq_decode_args& call = known->call = {};
    std::memcpy((char*)&call + sizeof(call) - packed_bytes, packed, size_t(packed_bytes));
    const auto shape_of = [](PyObject* object, Shape& shape) {
        const at::IntArrayRef sizes = tensor_of(object).sizes();
        if (sizes.size() == shape.size()) std::copy(sizes.begin(), sizes.end(), shape.begin());
        return sizes.size() == shape.size();
    };
    if (!shape_of(q, known->q_shape) || (at.k >= 0 && !shape_of(PyTuple_GET_ITEM(args, at.k), known->new_shape)))
        return PyErr_Format(PyExc_ValueError, "vectors of %s must have four dimensions", op);
    for (const Py_ssize_t place : at.held) {
        PyObject* object = PyTuple_GET_ITEM(args, place);
        const void* address = object == Py_None ? nullptr : tensor_of(object).const_data_ptr();
        const size_t i = known->tensors.size();
        known->tensors.push_back({object, address, i < 2 ? versions[i] : -1});
    }
    known->dtype = tensor_of(q).scalar_type();
    call.batch = known->q_shape[0];
    call.query_heads = known->q_shape[1];
    call.steps = known->q_shape[2];
    call.dtype = dtype;
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
PyModuleDef definition{PyModuleDef_HEAD_INIT, "pqlab_cpu_caller", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_pqlab_cpu_caller() { return PyModule_Create(&definition); }
