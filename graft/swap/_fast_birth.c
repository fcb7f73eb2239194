/* The plain case of transport born, compiled: socket(2) of a known thread, answered with a spare socket.
 *
 * Theory of operation
 *
 *     RECV ── plain kind? ── known thread? ── same namespace? ── a spare of its kind and owner? ── ADDFD ── close ── SEND
 *                  └──────────────┴──────────────────┴───────────────────┴────────────────────────┴── any "no": to Python
 *
 * Where the last spare was used, new ones of its kind are made and tagged before the next RECV, as graft/swap/socket_pool.py
 * does it. That is worth as much as all the rest: Python would need longer for one call than this for sixteen.
 *
 * Everything that needs thought is done by Python (graft/swap/birth.py), which gets the notification as the kernel wrote
 * it and not answered. So nothing here may answer a call with anything but success, and whatever fails is a "no": the
 * spare goes back, and Python finds out what is wrong. A thread is known once Python has looked it up, and the first
 * spares of a kind are Python's.
 *
 * The notification being served is in the journal, memory that is shared with the keeper's process, until it is answered
 * (graft/swap/supervisor.py). The loop runs without the interpreter's lock: one thread at a time may be in it, and no
 * other may touch the object meanwhile (`serving`).
 *
 * Sources: seccomp_unotify(2), include/uapi/linux/seccomp.h, include/uapi/linux/pidfd.h, proc_pid_ns(5). Of arguments
 * that the kernel treats as int the lower half is what counts.
 */
#define Py_LIMITED_API 0x030B0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <fcntl.h>
#include <linux/seccomp.h>
#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MAX_SPARES 64
#define MAX_CALLERS 128 /* two descriptors each; Python's own cache has 512, and some systems allow 1024 in all */
#define MAX_NAME 64
/* Calls in a row before Python looks whether it is to stop: the signal that says so comes between two of them only if
 * it is lucky, and is sent a hundred times a second. */
#define BATCH 256

/* PIDFD_GET_INFO (6.13): headers are older than kernels. */
struct thread_info {
	uint64_t mask, cgroup;
	uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
	int32_t exit_code;
};
#define GET_INFO _IOWR(0xFF, 11, struct thread_info)
#define INFO_CREDENTIALS (1 << 1)

struct kind {
	int family, type, protocol; /* type: with SOCK_NONBLOCK, without SOCK_CLOEXEC */
	uint32_t uid, gid;
};

struct spare {
	struct kind kind;
	int fd;
};

struct caller {
	uint32_t tid; /* 0: no caller */
	int pidfd, netns; /* netns: /proc/TID/ns/net itself, the symbolic link (O_PATH) */
};

typedef struct {
	PyObject_HEAD
	int listener;
	uint32_t arch;
	int number;
	char name[MAX_NAME]; /* of the container's namespace, as the link says it */
	size_t name_size;
	size_t spare_count;
	struct spare spares[MAX_SPARES]; /* the oldest first */
	struct caller callers[MAX_CALLERS]; /* by tid % MAX_CALLERS */
	Py_buffer next_home; /* of the desk, one byte; not there: no spares are made here (`make_spares`) */
	uint8_t home; /* what is written there, for the hook to tag the next socket and write 0 */
	int refill;
	int serving;
	unsigned long long served;
} FastBirth;

static int same_kind(const struct kind *a, const struct kind *b)
{
	return a->family == b->family && a->type == b->type && a->protocol == b->protocol && a->uid == b->uid &&
	       a->gid == b->gid;
}

/* The newest spare of a kind, or -1. */
static int find_spare(const FastBirth *self, const struct kind *kind)
{
	for (int i = (int)self->spare_count - 1; i >= 0; i--)
		if (same_kind(&self->spares[i].kind, kind))
			return i;
	return -1;
}

static int remove_spare(FastBirth *self, int index)
{
	int fd = self->spares[index].fd;

	self->spare_count--;
	memmove(&self->spares[index], &self->spares[index + 1],
		(self->spare_count - index) * sizeof(self->spares[0]));
	return fd;
}

/* The oldest spare makes room where there is none. */
static void stock(FastBirth *self, const struct kind *kind, int fd)
{
	if (self->spare_count == MAX_SPARES)
		close(remove_spare(self, 0));
	self->spares[self->spare_count].kind = *kind;
	self->spares[self->spare_count++].fd = fd;
}

static void forget(struct caller *caller)
{
	if (!caller->tid)
		return;
	close(caller->pidfd);
	close(caller->netns);
	caller->tid = 0;
}

/* Whether the call is a socket(2) that can have a spare; then its kind, but for its owner. */
static int is_plain(const FastBirth *self, const struct seccomp_notif *call, struct kind *kind)
{
	int type;

	if (call->data.arch != self->arch || call->data.nr != self->number)
		return 0;
	kind->family = (int)call->data.args[0];
	kind->type = (int)call->data.args[1] & ~SOCK_CLOEXEC;
	kind->protocol = (int)call->data.args[2];
	if (kind->family != AF_INET && kind->family != AF_INET6)
		return 0;
	type = kind->type & ~SOCK_NONBLOCK;
	return (type == SOCK_STREAM && (kind->protocol == 0 || kind->protocol == IPPROTO_TCP)) ||
	       (type == SOCK_DGRAM && (kind->protocol == 0 || kind->protocol == IPPROTO_UDP));
}

/* Whether the thread is known and in the container's namespace now; then who owns the files that it makes now. */
static int is_at_home(FastBirth *self, uint32_t tid, struct kind *kind)
{
	struct caller *caller = &self->callers[tid % MAX_CALLERS];
	struct thread_info info = { .mask = INFO_CREDENTIALS };
	char name[MAX_NAME];
	ssize_t size;

	if (!tid || caller->tid != tid)
		return 0;
	if (ioctl(caller->pidfd, GET_INFO, &info)) {
		forget(caller); /* it has ended, and its id is another thread's now */
		return 0;
	}
	if (!(info.mask & INFO_CREDENTIALS))
		return 0;
	kind->uid = info.fsuid;
	kind->gid = info.fsgid;
	size = readlinkat(caller->netns, "", name, sizeof(name));
	return size > 0 && (size_t)size == self->name_size && !memcmp(name, self->name, size);
}

/* Who owns the files that this thread makes from here on. setfsuid(2) says nothing where it fails: it tells what there
 * was, and that is asked for again. */
static int set_file_ids(uint32_t uid, uint32_t gid)
{
	syscall(SYS_setfsgid, gid);
	syscall(SYS_setfsuid, uid);
	return (uint32_t)syscall(SYS_setfsgid, -1) == gid && (uint32_t)syscall(SYS_setfsuid, -1) == uid;
}

/* A host-homed socket of that kind with its tag, or -1. */
static int make_tagged(FastBirth *self, const struct kind *kind)
{
	volatile uint8_t *next_home = self->next_home.buf; /* the hook writes it */
	int fd;

	*next_home = self->home;
	fd = socket(kind->family, kind->type | SOCK_CLOEXEC, kind->protocol);
	if (!*next_home)
		return fd;
	*next_home = 0; /* the hook did not run: Python knows another way */
	if (fd >= 0)
		close(fd);
	return -1;
}

/* Make spares of a kind that has none left, as its owner: firewalls ask who opened a socket's file. */
static void refill(FastBirth *self, const struct kind *kind)
{
	int as_owner = kind->uid || kind->gid, fd;

	if (!self->next_home.buf || find_spare(self, kind) >= 0)
		return;
	if (!as_owner || set_file_ids(kind->uid, kind->gid))
		for (int i = 0; i < self->refill && (fd = make_tagged(self, kind)) >= 0; i++)
			stock(self, kind, fd);
	if (as_owner && !set_file_ids(0, 0))
		_exit(1); /* with the wrong rights nothing may go on; the keeper starts another supervisor */
}

/* Answer the call with a spare; whether it is answered. This process's copy is closed before the program goes on: its
 * close() must be the last one, or its peer sees no end. Only death ends a caller's wait (graft/swap/birth.py): where
 * SEND finds nobody, nobody has the descriptor. */
static int answer(FastBirth *self, const struct seccomp_notif *call)
{
	struct seccomp_notif_addfd add = { .id = call->id };
	struct seccomp_notif_resp response = { .id = call->id };
	struct kind kind;
	int index, number;

	if (!is_plain(self, call, &kind) || !is_at_home(self, call->pid, &kind))
		return 0;
	index = find_spare(self, &kind);
	if (index < 0)
		return 0;
	add.srcfd = self->spares[index].fd;
	add.newfd_flags = (int)call->data.args[1] & SOCK_CLOEXEC ? O_CLOEXEC : 0;
	do
		number = ioctl(self->listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
	while (number < 0 && errno == EINTR); /* the kernel undid it, or has not started */
	if (number < 0)
		return 0;
	close(remove_spare(self, index));
	response.val = number;
	while (ioctl(self->listener, SECCOMP_IOCTL_NOTIF_SEND, &response) && errno == EINTR)
		;
	self->served++;
	refill(self, &kind);
	return 1;
}

/* 1: the notification in the page is Python's; 0: there is none; -1: an error of RECV. */
static int serve_batch(FastBirth *self, struct seccomp_notif *page)
{
	for (int i = 0; i < BATCH; i++) {
		if (ioctl(self->listener, SECCOMP_IOCTL_NOTIF_RECV, page))
			return errno == EINTR || errno == ENOENT ? 0 : -1;
		if (!answer(self, page))
			return 1;
		memset(page, 0, sizeof(*page));
	}
	return 0;
}

static int refuse_while_serving(const FastBirth *self)
{
	if (self->serving)
		PyErr_SetString(PyExc_RuntimeError, "another thread serves");
	return self->serving;
}

static PyObject *serve(FastBirth *self, PyObject *page)
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
	result = serve_batch(self, view.buf);
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

static PyObject *add(FastBirth *self, PyObject *args)
{
	struct kind kind;
	int fd;

	if (!PyArg_ParseTuple(args, "iiiIIi", &kind.family, &kind.type, &kind.protocol, &kind.uid, &kind.gid, &fd) ||
	    refuse_while_serving(self))
		return NULL;
	stock(self, &kind, fd);
	Py_RETURN_NONE;
}

static int parse_kind(FastBirth *self, PyObject *args, struct kind *kind)
{
	return PyArg_ParseTuple(args, "iiiII", &kind->family, &kind->type, &kind->protocol, &kind->uid, &kind->gid) &&
	       !refuse_while_serving(self);
}

static PyObject *take(FastBirth *self, PyObject *args)
{
	struct kind kind;
	int index;

	if (!parse_kind(self, args, &kind))
		return NULL;
	index = find_spare(self, &kind);
	return PyLong_FromLong(index < 0 ? -1 : remove_spare(self, index));
}

static PyObject *count(FastBirth *self, PyObject *args)
{
	struct kind kind;
	long found = 0;

	if (!parse_kind(self, args, &kind))
		return NULL;
	for (size_t i = 0; i < self->spare_count; i++)
		found += same_kind(&self->spares[i].kind, &kind);
	return PyLong_FromLong(found);
}

static PyObject *make_spares(FastBirth *self, PyObject *args)
{
	PyObject *next_home;
	unsigned char home;
	Py_buffer view;
	int refill;

	if (!PyArg_ParseTuple(args, "Obi", &next_home, &home, &refill) || refuse_while_serving(self) ||
	    PyObject_GetBuffer(next_home, &view, PyBUF_WRITABLE))
		return NULL;
	if (view.len != 1 || !home || refill < 0 || refill > MAX_SPARES) {
		PyBuffer_Release(&view);
		PyErr_SetString(PyExc_ValueError, "one byte, a home, and not too many");
		return NULL;
	}
	if (self->next_home.buf)
		PyBuffer_Release(&self->next_home);
	self->next_home = view;
	self->home = home;
	self->refill = refill;
	Py_RETURN_NONE;
}

static PyObject *know(FastBirth *self, PyObject *args)
{
	struct caller *slot, new;
	int pidfd, fdinfo;

	if (!PyArg_ParseTuple(args, "Iii", &new.tid, &pidfd, &fdinfo) || refuse_while_serving(self))
		return NULL;
	slot = &self->callers[new.tid % MAX_CALLERS];
	if (slot->tid == new.tid)
		Py_RETURN_NONE;
	new.pidfd = fcntl(pidfd, F_DUPFD_CLOEXEC, 0);
	if (new.pidfd < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	new.netns = openat(fdinfo, "../ns/net", O_PATH | O_NOFOLLOW | O_CLOEXEC);
	if (new.netns < 0) {
		PyErr_SetFromErrno(PyExc_OSError);
		close(new.pidfd);
		return NULL;
	}
	forget(slot);
	*slot = new;
	Py_RETURN_NONE;
}

static int initialize(FastBirth *self, PyObject *args, PyObject *keywords)
{
	const char *name;
	Py_ssize_t size;

	if (keywords && PyDict_Size(keywords)) {
		PyErr_SetString(PyExc_TypeError, "no keyword arguments");
		return -1;
	}
	if (!PyArg_ParseTuple(args, "is#Ii", &self->listener, &name, &size, &self->arch, &self->number) ||
	    refuse_while_serving(self))
		return -1;
	if (!size || size >= MAX_NAME) { /* readlinkat cuts what is longer */
		PyErr_SetString(PyExc_ValueError, "not a namespace's name");
		return -1;
	}
	memcpy(self->name, name, size);
	self->name_size = size;
	return 0;
}

static void deallocate(FastBirth *self)
{
	PyTypeObject *type = Py_TYPE((PyObject *)self);
	freefunc release = (freefunc)PyType_GetSlot(type, Py_tp_free);

	while (self->spare_count)
		close(remove_spare(self, (int)self->spare_count - 1));
	for (size_t i = 0; i < MAX_CALLERS; i++)
		forget(&self->callers[i]);
	if (self->next_home.buf)
		PyBuffer_Release(&self->next_home);
	release(self);
	Py_DECREF(type);
}

static PyMethodDef methods[] = {
	{ "add", (PyCFunction)add, METH_VARARGS,
	  "Stock a spare socket, by its kind, its owner and its descriptor, which is the object's from here on." },
	{ "take", (PyCFunction)take, METH_VARARGS, "Take a spare of that kind and owner out of the stock; -1: none." },
	{ "count", (PyCFunction)count, METH_VARARGS, "How many spares of that kind and owner there are." },
	{ "make_spares", (PyCFunction)make_spares, METH_VARARGS,
	  "Make spares here too: the desk's next_home, what to write there, and how many at a time." },
	{ "know", (PyCFunction)know, METH_VARARGS, "Remember a thread by its id, its pidfd and its open /proc/TID/fdinfo." },
	{ "serve", (PyCFunction)serve, METH_O,
	  "Answer calls. True: the page has a call that is not answered. False: it is zero, look whether to stop." },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef members[] = {
	{ "served", T_ULONGLONG, offsetof(FastBirth, served), READONLY, "How many calls were answered." },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot slots[] = {
	{ Py_tp_doc, "Answers socket(2): listener, namespace's name, AUDIT_ARCH, number of socket(2)." },
	{ Py_tp_init, initialize },
	{ Py_tp_new, PyType_GenericNew },
	{ Py_tp_dealloc, deallocate },
	{ Py_tp_methods, methods },
	{ Py_tp_members, members },
	{ 0, NULL },
};

static PyType_Spec spec = {
	.name = "graft.swap._fast_birth.FastBirth",
	.basicsize = sizeof(FastBirth),
	.flags = Py_TPFLAGS_DEFAULT,
	.slots = slots,
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_fast_birth",
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__fast_birth(void)
{
	PyObject *module = PyModule_Create(&definition);
	PyObject *type = module ? PyType_FromSpec(&spec) : NULL;

	if (!type || PyModule_AddObjectRef(module, "FastBirth", type)) {
		Py_XDECREF(type);
		Py_XDECREF(module);
		return NULL;
	}
	Py_DECREF(type);
	return module;
}
