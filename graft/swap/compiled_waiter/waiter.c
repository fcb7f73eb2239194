/* What `graft run` becomes when its program runs: graft/swap/waiter.py in C, which takes a tenth of the memory.
 *
 * It does what that does, and nothing else: there is the explanation. Both are the shell's child, so they are written to
 * do as little as can be: they wait for the program, pass signals on, and ask for a supervisor when one has died, and for
 * the container's end. What they ask for is made in Python beforehand, and opaque to them.
 *
 * graft-wait STATE PROGRAM LISTENER JOURNAL KEEPER SUPERVISOR CONTROL SERVER
 *
 * STATE is the descriptor of a file with texts, each after its length (4 bytes): the container's name, the requests for a
 * supervisor and for the end, then, each list after its length, the words and the environment of a process that serves
 * one request.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_RESTARTS = 10, LOOK_MILLISECONDS = 100, HELLO = '+', ASK = '?', FAILED = 6 /* graft.errors.KernelError */ };
static const double IN_SECONDS = 5.0, HELLO_SECONDS = 20.0;

struct text {
	char *bytes; /* ends with 0, which does not count */
	uint32_t size;
};

static struct text name, start_request, end_request;
static char **command, **environment;
static int program, listener, journal, keeper, supervisor, control, server;
static double starts[MAX_RESTARTS];
static int start_count;

/* ---- the state ------------------------------------------------------------------------------------- */

static const char *rest, *rest_end;

static uint32_t take_number(void)
{
	uint32_t found;

	if (rest_end - rest < (long)sizeof(found))
		_exit(FAILED);
	memcpy(&found, rest, sizeof(found));
	rest += sizeof(found);
	return found;
}

static struct text take_text(void)
{
	struct text found = {.size = take_number()};

	if (rest_end - rest < found.size || !(found.bytes = malloc(found.size + 1)))
		_exit(FAILED);
	memcpy(found.bytes, rest, found.size);
	found.bytes[found.size] = 0;
	rest += found.size;
	return found;
}

static char **take_list(void)
{
	uint32_t count = take_number();
	char **found = calloc(count + 1UL, sizeof(*found));

	if (!found)
		_exit(FAILED);
	for (uint32_t at = 0; at < count; at++)
		found[at] = take_text().bytes;
	return found;
}

static void load(int fd)
{
	struct stat status;
	void *file;

	if (fstat(fd, &status) < 0)
		_exit(FAILED);
	file = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (file == MAP_FAILED)
		_exit(FAILED);
	rest = file;
	rest_end = rest + status.st_size;
	name = take_text();
	start_request = take_text();
	end_request = take_text();
	command = take_list();
	environment = take_list();
	munmap(file, status.st_size);
	close(fd);
}

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec + time.tv_nsec / 1e9;
}

/* ---- requests -------------------------------------------------------------------------------------- */

static int connect_to_server(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	/* not to wait until a server that is stopped accepts others */
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

	snprintf(address.sun_path, sizeof(address.sun_path), "/proc/self/fd/%d", server);
	if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0) {
		close(fd);
		fd = -1;
	}
	if (fd >= 0)
		fcntl(fd, F_SETFL, 0);
	return fd;
}

/* A connection to a process that is started for one request. It leaves a child, which serves it. */
static int spawn_server(void)
{
	posix_spawn_file_actions_t files;
	posix_spawnattr_t attributes;
	sigset_t none;
	int ends[2], error;
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) < 0)
		return -1;
	sigemptyset(&none);
	posix_spawn_file_actions_init(&files);
	posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDWR, 0);
	posix_spawn_file_actions_adddup2(&files, 0, 1);
	posix_spawn_file_actions_adddup2(&files, 0, 2);
	posix_spawn_file_actions_adddup2(&files, ends[1], 3);
	posix_spawnattr_init(&attributes);
	posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSID);
	posix_spawnattr_setsigmask(&attributes, &none);
	error = posix_spawn(&pid, command[0], &files, &attributes, command, environment);
	posix_spawn_file_actions_destroy(&files);
	posix_spawnattr_destroy(&attributes);
	close(ends[1]);
	if (error) {
		close(ends[0]);
		return -1;
	}
	while (waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return ends[0];
}

static int is_stopped(pid_t pid)
{
	char path[32], text[512], *name_end;
	ssize_t size;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	size = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (size <= 0)
		return 0;
	text[size] = 0;
	name_end = strrchr(text, ')');
	return name_end && (!strncmp(name_end, ") T", 3) || !strncmp(name_end, ") t", 3));
}

/* Whether somebody is there for this connection: not where the process that listens is stopped. */
static int is_answered(int fd)
{
	struct pollfd polled = {.fd = fd, .events = POLLIN};
	struct ucred peer = {0};
	socklen_t size = sizeof(peer);
	double deadline = now() + HELLO_SECONDS;
	char hello, ask = ASK;

	getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size); /* of a pair: this process */
	while (poll(&polled, 1, LOOK_MILLISECONDS) <= 0)
		if ((peer.pid != getpid() && is_stopped(peer.pid)) || now() > deadline)
			return 0;
	return recv(fd, &hello, 1, 0) == 1 && hello == HELLO && send(fd, &ask, 1, MSG_NOSIGNAL) == 1 &&
	       recv(fd, &hello, 1, 0) == 1 && hello == HELLO;
}

/* The answer, one byte, to a request with descriptors; -1 where there is none. *received is a descriptor that came. */
static int ask_at(int fd, struct text request, const int *fds, size_t count, int *received)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(8 * sizeof(int))];
	} rights = {0};
	struct iovec data = {request.bytes, request.size};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &rights};
	struct cmsghdr *found;
	unsigned char answer;
	ssize_t sent;

	message.msg_controllen = CMSG_SPACE(count * sizeof(int));
	rights.header.cmsg_level = SOL_SOCKET;
	rights.header.cmsg_type = SCM_RIGHTS;
	rights.header.cmsg_len = CMSG_LEN(count * sizeof(int));
	memcpy(CMSG_DATA(&rights.header), fds, count * sizeof(int));
	sent = sendmsg(fd, &message, MSG_NOSIGNAL);
	while (sent > 0 && (size_t)sent < data.iov_len) {
		data.iov_base = (char *)data.iov_base + sent;
		data.iov_len -= sent;
		sent = send(fd, data.iov_base, data.iov_len, MSG_NOSIGNAL);
	}
	if (sent <= 0)
		return -1;
	data = (struct iovec){&answer, 1};
	message.msg_controllen = CMSG_SPACE(sizeof(int));
	if (recvmsg(fd, &message, MSG_CMSG_CLOEXEC) != 1)
		return -1;
	found = CMSG_FIRSTHDR(&message);
	if (found && found->cmsg_level == SOL_SOCKET && found->cmsg_type == SCM_RIGHTS)
		memcpy(received, CMSG_DATA(found), sizeof(*received));
	return answer;
}

static int ask(struct text request, const int *fds, size_t count, int *received)
{
	int (*const ways[])(void) = {connect_to_server, spawn_server};
	int answer = -1;

	for (size_t way = 0; way < sizeof(ways) / sizeof(*ways) && answer < 0; way++) {
		int fd = ways[way]();

		if (fd >= 0) {
			if (is_answered(fd))
				answer = ask_at(fd, request, fds, count, received);
			close(fd);
		}
	}
	return answer;
}

/* ---- the supervisor -------------------------------------------------------------------------------- */

/* Have SIGIO sent when the supervisor has died. */
static void watch(void)
{
	fcntl(control, F_SETOWN, getpid());
	fcntl(control, F_SETFL, fcntl(control, F_GETFL) | O_ASYNC);
}

static int has_died(void)
{
	struct pollfd polled = {.fd = control};

	return control >= 0 && poll(&polled, 1, 0) > 0;
}

/* Note a start; whether there were too many of late. */
static int is_one_too_many(void)
{
	int kept = 0;

	for (int at = 0; at < start_count; at++)
		if (now() - starts[at] < IN_SECONDS)
			starts[kept++] = starts[at];
	start_count = kept;
	if (start_count == MAX_RESTARTS)
		return 1;
	starts[start_count++] = now();
	return 0;
}

/* Start a supervisor in the place of one that has died. Whether that was possible. */
static int restart(void)
{
	int ends[2], fds[5];

	if (is_one_too_many()) {
		dprintf(2, "graft: the supervisor of %s died %d times in a row\n", name.bytes, MAX_RESTARTS);
		return 0;
	}
	close(control);
	close(supervisor);
	control = supervisor = -1;
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0) {
		memcpy(fds, (int[]){listener, journal, keeper, ends[1], 2}, sizeof(fds));
		ask(start_request, fds, 5, &supervisor);
		close(ends[1]);
		control = ends[0];
	}
	if (supervisor < 0) {
		dprintf(2, "graft: cannot start a supervisor for %s\n", name.bytes);
		return 0;
	}
	watch();
	return 1;
}

/* Remove the container; the exit status of a failure, 0 for none. */
static int end(void)
{
	int fds[] = {2, supervisor}, none = -1;
	int answer = ask(end_request, fds, supervisor < 0 ? 1 : 2, &none);

	return answer < 0 ? FAILED : answer;
}

/* ---- the program ----------------------------------------------------------------------------------- */

/* Whether the program has exited, with *status. If it is stopped, this process stops too, until SIGCONT. */
static int has_exited(int *status)
{
	while (waitpid(program, status, WNOHANG | WUNTRACED | WCONTINUED) > 0) {
		if (WIFSTOPPED(*status))
			raise(SIGSTOP);
		else if (WIFEXITED(*status) || WIFSIGNALED(*status))
			return 1;
	}
	return 0;
}

static void forwarded(sigset_t *signals)
{
	sigfillset(signals);
	for (const int *at = (int[]){SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGFPE, SIGILL, 0}; *at; at++)
		sigdelset(signals, *at);
}

/* Until the program exits: forward signals, stop when it stops, keep a supervisor running. Gives a status of wait(2), -1
 * where there can be no supervisor. */
static int wait_for_program(void)
{
	sigset_t signals;
	siginfo_t info;
	int status;

	forwarded(&signals);
	for (;;) {
		if (has_died() && !restart())
			return -1;
		if (sigwaitinfo(&signals, &info) < 0)
			continue;
		if (info.si_signo == SIGCHLD) {
			if (has_exited(&status))
				return status;
		} else if (info.si_code != SI_KERNEL) {
			/* A terminal sends a signal to the whole foreground group: the program has received it. */
			kill(program, info.si_signo);
		}
	}
}

static void die_by_signal(int number)
{
	struct rlimit limit = {0};
	sigset_t one;

	getrlimit(RLIMIT_CORE, &limit);
	limit.rlim_cur = 0;
	setrlimit(RLIMIT_CORE, &limit);
	signal(number, SIG_DFL);
	sigemptyset(&one);
	sigaddset(&one, number);
	sigprocmask(SIG_UNBLOCK, &one, NULL);
	kill(getpid(), number);
}

int main(int count, char **words)
{
	int *const numbers[] = {&program, &listener, &journal, &keeper, &supervisor, &control, &server};
	int status, failed;

	if (count != 9)
		return FAILED;
	for (int at = 0; at < 7; at++)
		*numbers[at] = atoi(words[at + 2]);
	for (int at = 1; at < 7; at++)
		if (*numbers[at] >= 0)
			fcntl(*numbers[at], F_SETFD, FD_CLOEXEC);
	load(atoi(words[1]));
	/* Kept open: any user may hold the folder above it, and whoever looks up a name there that the kernel has
	 * forgotten waits for him, as connect_to_server() would. */
	open("/proc/self/fd", O_PATH | O_DIRECTORY | O_CLOEXEC);
	starts[start_count++] = now();
	if (control >= 0)
		watch();
	status = wait_for_program();
	failed = end();
	if (status < 0)
		failed = FAILED;
	if (!failed && WIFSIGNALED(status))
		die_by_signal(WTERMSIG(status));
	_exit(failed ? failed : WEXITSTATUS(status));
}
