/* What Python sees of the compiled part: the type FastCalls (graft/swap/_fast_calls.pyi). */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <structmember.h>

#include "fast_calls.h"

#include <errno.h>
#include <string.h>

typedef struct {
	PyObject_HEAD
	struct fast_calls calls;
	Py_buffer desk, times;
	int serving;
} FastCalls;

static int refuse_while_serving(const FastCalls *self)
{
	if (self->serving)
		PyErr_SetString(PyExc_RuntimeError, "another thread serves");
	return self->serving;
}

static PyObject *serve(FastCalls *self, PyObject *page)
{
	Py_buffer view;
	int result, error;

	if (refuse_while_serving(self) || PyObject_GetBuffer(page, &view, PyBUF_WRITABLE))
		return NULL;
	if (view.len < (Py_ssize_t)sizeof(struct seccomp_notif)) {
		PyBuffer_Release(&view);
		PyErr_SetString(PyExc_ValueError, "the page is too small for a notification");
		return NULL;
	}
	self->serving = 1;
	Py_BEGIN_ALLOW_THREADS
	result = serve_batch(&self->calls, view.buf);
	error = errno;
	Py_END_ALLOW_THREADS
	self->serving = 0;
	PyBuffer_Release(&view);
	if (result < 0) {
		errno = error;
		return PyErr_SetFromErrno(PyExc_OSError);
	}
	return PyBool_FromLong(result);
}

static PyObject *add(FastCalls *self, PyObject *args)
{
	struct kind kind;
	int fd;

	if (!PyArg_ParseTuple(args, "iiiIIi", &kind.family, &kind.type, &kind.protocol, &kind.uid, &kind.gid, &fd) ||
	    refuse_while_serving(self))
		return NULL;
	add_spare(&self->calls.stock, &kind, fd);
	Py_RETURN_NONE;
}

static int parse_kind(FastCalls *self, PyObject *args, struct kind *kind)
{
	return PyArg_ParseTuple(args, "iiiII", &kind->family, &kind->type, &kind->protocol, &kind->uid, &kind->gid) &&
	       !refuse_while_serving(self);
}

static PyObject *take(FastCalls *self, PyObject *args)
{
	struct stock *stock = &self->calls.stock;
	struct kind kind;
	int index;

	if (!parse_kind(self, args, &kind))
		return NULL;
	index = find_spare(stock, &kind);
	return PyLong_FromLong(index < 0 ? -1 : remove_spare(stock, index));
}

static PyObject *count(FastCalls *self, PyObject *args)
{
	struct kind kind;

	return parse_kind(self, args, &kind) ? PyLong_FromLong(count_spares(&self->calls.stock, &kind)) : NULL;
}

static PyObject *make_spares(FastCalls *self, PyObject *args)
{
	int refill;

	if (!PyArg_ParseTuple(args, "i", &refill) || refuse_while_serving(self))
		return NULL;
	if (refill < 0 || refill > MAX_SPARES) {
		PyErr_SetString(PyExc_ValueError, "too many spares");
		return NULL;
	}
	self->calls.stock.refill = refill;
	Py_RETURN_NONE;
}

static PyObject *answer_births(FastCalls *self, PyObject *args)
{
	struct births *births = &self->calls.births;
	const char *name;
	Py_ssize_t size;
	int number;

	if (!PyArg_ParseTuple(args, "is#", &number, &name, &size) || refuse_while_serving(self))
		return NULL;
	if (!size || size >= MAX_NAME) { /* readlinkat cuts what is longer */
		PyErr_SetString(PyExc_ValueError, "not a namespace's name");
		return NULL;
	}
	forget_all(&self->calls); /* their namespaces are not open */
	births->number = number;
	memcpy(births->name, name, size);
	births->name_size = size;
	Py_RETURN_NONE;
}

static PyObject *answer_connects(FastCalls *self, PyObject *args)
{
	int number;

	if (!PyArg_ParseTuple(args, "i", &number) || refuse_while_serving(self))
		return NULL;
	forget_all(&self->calls); /* their folders are not open */
	self->calls.connects.number = number;
	Py_RETURN_NONE;
}

static PyObject *remember_answer(FastCalls *self, PyObject *args)
{
	struct kind kind = { 0 };
	const char *answer;
	Py_ssize_t size;

	if (!PyArg_ParseTuple(args, "y#iii", &answer, &size, &kind.family, &kind.type, &kind.protocol) ||
	    refuse_while_serving(self))
		return NULL;
	if (size != ANSWER_SIZE) {
		PyErr_SetString(PyExc_ValueError, "not a desk's answer");
		return NULL;
	}
	remember(&self->calls.connects, answer, &kind);
	Py_RETURN_NONE;
}

static PyObject *know_thread(FastCalls *self, PyObject *args)
{
	unsigned int tid;
	int pidfd, fdinfo;

	if (!PyArg_ParseTuple(args, "Iii", &tid, &pidfd, &fdinfo) || refuse_while_serving(self))
		return NULL;
	if (know(&self->calls, tid, pidfd, fdinfo))
		return PyErr_SetFromErrno(PyExc_OSError);
	Py_RETURN_NONE;
}

static PyObject *count_times(FastCalls *self, PyObject *slot)
{
	Py_buffer view;

	if (refuse_while_serving(self) || PyObject_GetBuffer(slot, &view, PyBUF_WRITABLE))
		return NULL;
	if (view.len != sizeof(struct call_times) || (uintptr_t)view.buf % _Alignof(struct call_times)) {
		PyBuffer_Release(&view);
		PyErr_SetString(PyExc_ValueError, "not a slot of call times");
		return NULL;
	}
	if (self->times.buf)
		PyBuffer_Release(&self->times);
	self->times = view;
	self->calls.times = view.buf;
	Py_RETURN_NONE;
}

static int initialize(FastCalls *self, PyObject *args, PyObject *keywords)
{
	PyObject *desk;
	Py_buffer view;
	unsigned int arch;
	int listener;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(args, "iIO", &listener, &arch, &desk) || refuse_while_serving(self) ||
	    PyObject_GetBuffer(desk, &view, PyBUF_WRITABLE))
		return -1;
	if (view.len != sizeof(struct desk) || (uintptr_t)view.buf % _Alignof(struct desk)) {
		PyBuffer_Release(&view);
		PyErr_SetString(PyExc_ValueError, "not a desk");
		return -1;
	}
	if (self->desk.buf)
		PyBuffer_Release(&self->desk);
	self->desk = view;
	self->calls.listener = listener;
	self->calls.arch = arch;
	self->calls.births.number = self->calls.connects.number = -1;
	self->calls.stock.desk = view.buf;
	return 0;
}

static void deallocate(FastCalls *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	close_spares(&self->calls.stock);
	close_replaced(&self->calls.connects);
	forget_all(&self->calls);
	if (self->desk.buf)
		PyBuffer_Release(&self->desk);
	if (self->times.buf)
		PyBuffer_Release(&self->times);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef methods[] = {
	{ "add", (PyCFunction)add, METH_VARARGS,
	  "Stock a spare socket, by its kind, its owner and its descriptor, which is the object's from here on." },
	{ "take", (PyCFunction)take, METH_VARARGS, "Take a spare of that kind and owner out of the stock; -1: none." },
	{ "count", (PyCFunction)count, METH_VARARGS, "How many spares of that kind and owner there are." },
	{ "make_spares", (PyCFunction)make_spares, METH_VARARGS, "Make spares here too, that many at a time." },
	{ "answer_births", (PyCFunction)answer_births, METH_VARARGS,
	  "Answer socket(2): its number, and the name of the container's namespace." },
	{ "answer_connects", (PyCFunction)answer_connects, METH_VARARGS, "Answer connect(2): its number." },
	{ "remember", (PyCFunction)remember_answer, METH_VARARGS,
	  "A socket about which the desk has that answer is replaced, for a connect, by a spare of that kind." },
	{ "know", (PyCFunction)know_thread, METH_VARARGS,
	  "Remember a thread by its id, its pidfd and its open /proc/TID/fdinfo." },
	{ "count_times", (PyCFunction)count_times, METH_O, "Count there how long calls take." },
	{ "serve", (PyCFunction)serve, METH_O,
	  "Answer calls. True: the page has a call that is not answered. False: it is zero, look whether to stop." },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
	{ "served", T_ULONGLONG, offsetof(FastCalls, calls.served), READONLY, "How many calls were answered." },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_doc, "Answers plain calls: listener, AUDIT_ARCH, the desk's memory." },
	{ Py_tp_init, initialize },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, deallocate },
	{ Py_tp_methods, methods },
	{ Py_tp_members, members },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "graft.swap._fast_calls.FastCalls",
	.basicsize = sizeof(FastCalls),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_fast_calls",
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__fast_calls(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *type = module ? PyType_FromSpec(&spec) : NULL;

	if (!type || PyModule_AddObjectRef(module, "FastCalls", type) ||
	    PyModule_AddIntConstant(module, "LAYOUT_VERSION", GRAFT_LAYOUT_VERSION) ||
	    PyModule_AddIntConstant(module, "TIME_BOUNDS", TIME_BOUNDS)) {
		Py_XDECREF(type);
		Py_XDECREF(module);
		return NULL;
	}
	Py_DECREF(type);
	return module;
}
