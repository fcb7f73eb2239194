// SPDX-License-Identifier: (MIT OR GPL-2.0-only)
/* Who calls: a supervisor, by its desk, and the thread whose call it serves. */

/* The desk of the calling supervisor; NULL for every other process. A process that got the id of a dead supervisor
 * is not in that supervisor's cgroup. */
static __always_inline struct desk *desk_of_caller(void)
{
	u32 pid = bpf_get_current_pid_tgid() >> 32;
	struct desk_slot *slot = desk_slots.lookup(&pid);

	if (!slot || bpf_get_current_cgroup_id() != slot->cgroup)
		return 0;
	return desks.lookup(&slot->desk);
}

#ifdef GRAFT_PROBE
#ifdef GRAFT_TASK_FILES
/* The file at descriptor `fd` of `task`; *cloexec: whether the descriptor is closed on exec. */
static __always_inline void *file_at(void *task, s32 fd, u32 *cloexec)
{
	void *files = read_pointer(task + GRAFT_TASK_FILES);
	void *table = files ? read_pointer(files + GRAFT_FILES_TABLE) : 0;
	void *array, *bits;
	u64 word = 0;
	u32 size = 0;

	if (!table || bpf_probe_read_kernel(&size, sizeof(size), table + GRAFT_TABLE_SIZE) || fd < 0 || fd >= size)
		return 0;
	array = read_pointer(table + GRAFT_TABLE_FILES);
	bits = read_pointer(table + GRAFT_TABLE_CLOEXEC);
	if (!array || !bits || bpf_probe_read_kernel(&word, sizeof(word), bits + fd / 64 * 8))
		return 0;
	*cloexec = word >> (fd % 64) & 1;
	return read_pointer(array + 8 * (u64)fd);
}

/* The thread TID of /proc/TID/fdinfo; `fdinfo` is the caller's descriptor of that folder. */
static __always_inline void *thread_of(s32 fdinfo)
{
	u32 cloexec;
	void *file = file_at((void *)bpf_get_current_task(), fdinfo, &cloexec);
	void *inode = file ? read_pointer(file + GRAFT_FILE_INODE) : 0;
	void *pid = inode ? read_pointer(inode - GRAFT_PROC_INODE_VFS + GRAFT_PROC_INODE_PID) : 0;
	void *node = pid ? read_pointer(pid + GRAFT_PID_TASKS) : 0; /* the first list, PIDTYPE_PID */

	return node ? node - GRAFT_TASK_PID_LINKS : 0;
}

/* The name and the process of the thread whose call a supervisor serves. */
static __always_inline void read_served(struct desk *desk, struct event *event)
{
	void *task = thread_of(desk->fdinfo);

	if (!task)
		return;
	bpf_probe_read_kernel(&event->pid, sizeof(event->pid), task + GRAFT_TASK_TGID);
	bpf_probe_read_kernel(event->comm, sizeof(event->comm), task + GRAFT_TASK_COMM);
}

/* The thread that runs, out of the kernel's own structure: for programs that may not ask for it. Nobody where that is a
 * supervisor: whose call it makes is found by its desk (desk_of_caller()), which these may not look for either. */
static __always_inline void read_task(struct event *event)
{
	void *task = (void *)bpf_get_current_task();
	u32 pid = 0;

	if (bpf_probe_read_kernel(&pid, sizeof(pid), task + GRAFT_TASK_TGID) || desk_slots.lookup(&pid))
		return;
	event->pid = pid;
	bpf_probe_read_kernel(&event->tid, sizeof(event->tid), task + GRAFT_TASK_PID);
	bpf_probe_read_kernel(event->comm, sizeof(event->comm), task + GRAFT_TASK_COMM);
}
#define GRAFT_READS_TASKS
#endif
#endif

#ifndef GRAFT_READS_TASKS
static __always_inline void read_served(struct desk *desk, struct event *event) {}
static __always_inline void read_task(struct event *event) {}
#endif
