// SPDX-License-Identifier: Apache-2.0
//
// C++ functions of numbers and strings as Python functions, through CPython's limited API: one build serves every
// Python from 3.10 on. A call takes its arguments by position and runs without the GIL.
//
//     PyMethodDef functions[] = {bind::function<pool_rows>("pool_rows"), ..., {}};

#pragma once

#include <pyconfig.h>
#ifndef Py_GIL_DISABLED  // a free-threaded Python has no stable ABI
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <cstdint>
#include <exception>
#include <limits>
#include <new>
#include <tuple>
#include <utility>
#include <vector>

namespace patchkern::bind {

// Python to C++; false with an exception set.

inline bool load(PyObject* given, int64_t* value) {
  *value = PyLong_AsLongLong(given);
  return *value != -1 || !PyErr_Occurred();
}

inline bool load(PyObject* given, int* value) {
  int64_t wide = 0;
  if (!load(given, &wide)) return false;
  *value = static_cast<int>(wide);
  if (*value == wide) return true;
  PyErr_SetString(PyExc_OverflowError, "expected an integer of 32 bits");
  return false;
}

inline bool load(PyObject* given, uintptr_t* address) {
  *address = PyLong_AsSize_t(given);
  return *address != static_cast<uintptr_t>(-1) || !PyErr_Occurred();
}

inline bool load(PyObject* given, bool* value) {
  const int truth = PyObject_IsTrue(given);
  *value = truth > 0;
  return truth >= 0;
}

inline bool load(PyObject* given, double* value) {
  *value = PyFloat_AsDouble(given);
  return *value != -1 || !PyErr_Occurred();
}

inline bool load(PyObject* given, float* value) {
  double wide = 0;
  if (!load(given, &wide)) return false;
  *value = static_cast<float>(wide);
  return true;
}

// Borrowed from the argument, which the caller keeps alive.
inline bool load(PyObject* given, const char** text) {
  *text = PyUnicode_AsUTF8AndSize(given, nullptr);
  return *text != nullptr;
}

// C++ to Python; null with an exception set.

inline PyObject* python(int value) { return PyLong_FromLong(value); }
inline PyObject* python(int64_t value) { return PyLong_FromLongLong(value); }
inline PyObject* python(const char* text) { return PyUnicode_FromString(text); }

template <class... Values>
PyObject* python(const std::tuple<Values...>& values) {
  PyObject* made = PyTuple_New(sizeof...(Values));
  if (made == nullptr) return nullptr;
  Py_ssize_t i = 0;
  const auto append = [&](PyObject* entry) { return entry != nullptr && PyTuple_SetItem(made, i++, entry) == 0; };
  if (std::apply([&](const auto&... value) { return (append(python(value)) && ...); }, values)) return made;
  Py_DECREF(made);
  return nullptr;
}

template <class Value>
PyObject* python(const std::vector<Value>& values) {
  PyObject* made = PyList_New(0);
  for (size_t i = 0; made != nullptr && i < values.size(); ++i) {
    PyObject* entry = python(values[i]);
    if (entry == nullptr || PyList_Append(made, entry) != 0) Py_CLEAR(made);
    Py_XDECREF(entry);
  }
  return made;
}

template <class Result, class... Arguments, size_t... I>
PyObject* call(Result (*function)(Arguments...), PyObject* const* given, std::index_sequence<I...>) {
  [[maybe_unused]] std::tuple<Arguments...> arguments;
  if (!(load(given[I], &std::get<I>(arguments)) && ...)) return nullptr;
  PyThreadState* const thread = PyEval_SaveThread();
  try {
    const Result result = function(std::get<I>(arguments)...);
    PyEval_RestoreThread(thread);
    return python(result);
  } catch (const std::bad_alloc&) {
    PyEval_RestoreThread(thread);
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyEval_RestoreThread(thread);
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

template <class Result, class... Arguments>
constexpr size_t arity(Result (*)(Arguments...)) {
  return sizeof...(Arguments);
}

template <auto target>
PyObject* entry(PyObject*, PyObject* const* given, Py_ssize_t count) {
  constexpr size_t expected = arity(target);
  if (count == static_cast<Py_ssize_t>(expected)) return call(target, given, std::make_index_sequence<expected>{});
  PyErr_Format(PyExc_TypeError, "expected %zu arguments, got %zd", expected, count);
  return nullptr;
}

template <auto target>
PyMethodDef function(const char* name) {
  const auto address = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&entry<target>));
  return {name, address, METH_FASTCALL, nullptr};
}

}  // namespace patchkern::bind
