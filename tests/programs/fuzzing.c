/* Makes the socket calls of tests/fuzz, by several threads, forked children and a process that is sent descriptors.
 *
 * Lines on standard input, answers on standard output:
 *
 *   begin               a child does what follows, in a process group of its own -> `ready NETNS`
 *   c T BY WAY OP SLOT ARGS   a call for thread T, kept until
 *   go                  each thread makes its calls, all threads at once -> `e ...` for each call, `done`
 *   drain               what datagram sockets have got -> `h COOKIE TEXT` each, `done`
 *   end                 all of the group is killed -> `ended`
 *
 * BY:  self, fork (a child makes the call on its copy of the descriptor, and keeps that), lent (another process,
 *      which gets the descriptor as SCM_RIGHTS)
 * WAY: plain, int80 (32-bit), uring; the latter two for bind, connect and listen
 * OP:  socket FAMILY TYPE PROTOCOL | bind ADDR PORT | connect ADDR PORT | unspec | listen BACKLOG | accept TO |
 *      shutdown HOW | dup TO | pass TO (to itself, as SCM_RIGHTS) | close | option LEVEL NAME HEX | receive |
 *      send ADDR PORT FLAGS | cmsg ADDR PORT FLAGS LEVEL TYPE HEX | nap MILLISECONDS
 *
 * ADDR may be `-` (none) and end in %INTERFACE. An answer is
 * `e CALL BEGIN END RESULT COOKIE NETNS`: nanoseconds of CLOCK_REALTIME, a negative errno where the call failed, and what
 * the descriptor is after the call.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>

#include "calling.h"

#define CALLS 256
#define THREADS 4
#define SLOTS 16
#define WORDS 12
#define LINE 1024

struct call {
	char line[LINE], split[LINE];
	char *word[WORDS];
	int words, thread, index;
};

struct event {
	long begin, end, result;
	unsigned long cookie, netns;
	int made;
};

static struct call calls[CALLS];
static struct event *events; /* shared with children */
static struct address *addresses; /* one for each thread and process that calls */
static int count, slots[SLOTS], helper = -1;
static pthread_barrier_t together;
static pthread_mutex_t helper_lock = PTHREAD_MUTEX_INITIALIZER;

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_REALTIME, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

/* A connect by io_uring that is not over after a tenth of a second is let go. */
static long make(const char *way, int call, int fd, struct address *to, int backlog)
{
	if (!strcmp(way, "int80"))
		return by_int80(call, fd, to, backlog);
	if (!strcmp(way, "uring"))
		return by_io_uring(call, fd, to, backlog, 100000000);
	return plainly(call, fd, to, backlog);
}

static long send_one(int fd, struct address *to, char **word, int words)
{
	char space[512] __attribute__((aligned(8))) = {};
	struct iovec data = { "fuzz", 4 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1 };

	if (strcmp(word[0], "-")) {
		parse_address(to, word[0], word[1]);
		message.msg_name = &to->storage;
		message.msg_namelen = to->length;
	}
	if (words > 5) {
		struct cmsghdr *header = (void *)space;
		size_t size = parse_hex(word[5], CMSG_DATA(header), 256);

		header->cmsg_level = atoi(word[3]);
		header->cmsg_type = atoi(word[4]);
		header->cmsg_len = CMSG_LEN(size);
		message.msg_control = space;
		message.msg_controllen = CMSG_SPACE(size);
	}
	return result_of(sendmsg(fd, &message, atoi(word[2]) | MSG_NOSIGNAL | MSG_DONTWAIT));
}

static int sent_to_itself(int fd)
{
	char byte = 0;
	int pair[2], got = -1;

	if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair))
		return -1;
	if (send_fd(pair[0], fd, &byte, 1) >= 0)
		got = receive_fd(pair[1], &byte, 1);
	close(pair[0]);
	close(pair[1]);
	return got;
}

/* The slot lets go of what it had. */
static long put(int slot, int fd)
{
	int old;

	if (fd < 0)
		return -errno;
	fcntl(fd, F_SETFL, O_NONBLOCK);
	old = __atomic_exchange_n(&slots[slot % SLOTS], fd, __ATOMIC_SEQ_CST);
	if (old >= 0)
		close(old);
	return 0;
}

/* The calls that any process can make that has the descriptor. */
static long act(const char *way, const char *op, int fd, struct address *to, char **word, int words)
{
	static const struct sockaddr unspec = { .sa_family = AF_UNSPEC };
	unsigned char bytes[256];
	char text[64];

	if (!strcmp(op, "bind") || !strcmp(op, "connect")) {
		parse_address(to, word[0], word[1]);
		return make(way, *op == 'b' ? BIND : CONNECT, fd, to, 0);
	}
	if (!strcmp(op, "listen"))
		return make(way, LISTEN, fd, to, atoi(word[0]));
	if (!strcmp(op, "unspec"))
		return result_of(connect(fd, &unspec, sizeof(unspec)));
	if (!strcmp(op, "shutdown"))
		return result_of(shutdown(fd, atoi(word[0])));
	if (!strcmp(op, "option")) {
		size_t size = parse_hex(word[2], bytes, sizeof(bytes));

		return result_of(setsockopt(fd, atoi(word[0]), atoi(word[1]), bytes, size));
	}
	if (!strcmp(op, "send") || !strcmp(op, "cmsg"))
		return send_one(fd, to, word, words);
	if (!strcmp(op, "receive"))
		return result_of(recv(fd, text, sizeof(text), MSG_DONTWAIT));
	return -ENOSYS;
}

static long act_here(struct call *call, int *fd)
{
	char **word = call->word + 6, *op = call->word[4];
	int slot = atoi(call->word[5]) % SLOTS;

	if (!strcmp(op, "nap"))
		return usleep(atoi(word[0]) * 1000);
	if (!strcmp(op, "socket"))
		return put(slot, *fd = socket(atoi(word[0]), atoi(word[1]), atoi(word[2])));
	if (!strcmp(op, "close")) {
		*fd = __atomic_exchange_n(&slots[slot], -1, __ATOMIC_SEQ_CST);
		return result_of(close(*fd));
	}
	*fd = slots[slot];
	if (!strcmp(op, "accept"))
		return put(atoi(word[0]), *fd = accept4(*fd, 0, 0, SOCK_NONBLOCK));
	if (!strcmp(op, "dup"))
		return put(atoi(word[0]), dup(*fd));
	if (!strcmp(op, "pass"))
		return put(atoi(word[0]), sent_to_itself(*fd));
	return act(call->word[3], op, *fd, &addresses[call->thread], word, call->words - 6);
}

static void note(struct event *event, long begin, long result, int fd)
{
	socklen_t size = sizeof(event->cookie), other = sizeof(event->netns);

	event->begin = begin;
	event->end = now();
	event->result = result;
	if (getsockopt(fd, SOL_SOCKET, 57 /* SO_COOKIE */, &event->cookie, &size) ||
	    getsockopt(fd, SOL_SOCKET, 71 /* SO_NETNS_COOKIE */, &event->netns, &other))
		event->cookie = event->netns = 0;
	__atomic_store_n(&event->made, 1, __ATOMIC_RELEASE);
}

/* In another process: what may be done there, on that descriptor, with an address of that number. */
static void act_there(struct call *call, int fd, int number)
{
	long begin = now();

	note(&events[call->index], begin,
	     act(call->word[3], call->word[4], fd, &addresses[number], call->word + 6, call->words - 6), fd);
}

static void split(struct call *call)
{
	char *rest = call->split, *word;

	strcpy(call->split, call->line);
	call->words = 0;
	while ((word = strsep(&rest, " ")) && call->words < WORDS)
		call->word[call->words++] = word;
	for (int i = call->words; i < WORDS; i++)
		call->word[i] = "0";
	call->thread = atoi(call->word[1]) % THREADS;
}

/* It gets descriptors, and keeps them. */
static void help(int through)
{
	static struct call call;
	char done = 0;
	int fd;

	for (;;) {
		fd = receive_fd(through, &call, sizeof(call));
		if (fd < 0)
			_exit(0);
		split(&call);
		act_there(&call, fd, THREADS);
		if (write(through, &done, 1) < 0)
			_exit(0);
	}
}

static void lend(struct call *call)
{
	char done;
	int slot = atoi(call->word[5]) % SLOTS;

	pthread_mutex_lock(&helper_lock);
	if (slots[slot] >= 0 && send_fd(helper, slots[slot], call, sizeof(*call)) >= 0 && read(helper, &done, 1) < 0)
		perror("helper");
	pthread_mutex_unlock(&helper_lock);
}

static void in_a_child(struct call *call)
{
	char done = 0;
	int ends[2];

	if (pipe(ends))
		return;
	if (!fork()) {
		close(ends[0]);
		act_there(call, slots[atoi(call->word[5]) % SLOTS], call->thread);
		if (write(ends[1], &done, 1) < 0)
			_exit(1);
		for (;;)
			pause();
	}
	close(ends[1]);
	if (read(ends[0], &done, 1) < 0)
		perror("child");
	close(ends[0]);
}

static void *work(void *argument)
{
	long thread = (long)argument, begin, result;
	int fd;

	pthread_barrier_wait(&together);
	for (int i = 0; i < count; i++) {
		if (calls[i].thread != thread)
			continue;
		if (!strcmp(calls[i].word[2], "lent")) {
			lend(&calls[i]);
		} else if (!strcmp(calls[i].word[2], "fork")) {
			in_a_child(&calls[i]);
		} else {
			fd = -1;
			begin = now();
			result = act_here(&calls[i], &fd);
			note(&events[i], begin, result, fd);
		}
	}
	return 0;
}

static void go(void)
{
	pthread_t threads[THREADS];

	memset(events, 0, CALLS * sizeof(*events));
	pthread_barrier_init(&together, 0, THREADS);
	for (long i = 0; i < THREADS; i++)
		pthread_create(&threads[i], 0, work, (void *)i);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], 0);
	for (int i = 0; i < count; i++)
		if (events[i].made)
			printf("e %d %ld %ld %ld %lu %lu\n", i, events[i].begin, events[i].end, events[i].result, events[i].cookie,
			       events[i].netns);
	printf("done\n");
	count = 0;
}

static void drain(void)
{
	char text[65];
	int type;

	for (int i = 0; i < SLOTS; i++) {
		unsigned long cookie = 0;
		socklen_t size = sizeof(cookie), four = sizeof(type);

		if (slots[i] < 0 || getsockopt(slots[i], SOL_SOCKET, SO_TYPE, &type, &four) || type != SOCK_DGRAM)
			continue;
		getsockopt(slots[i], SOL_SOCKET, 57, &cookie, &size);
		for (int n = 0; n < 64; n++) {
			ssize_t got = recv(slots[i], text, sizeof(text) - 1, MSG_DONTWAIT);

			if (got < 0 && errno != ECONNREFUSED && errno != EHOSTUNREACH)
				break;
			text[got < 0 ? 0 : got] = 0;
			if (!strncmp(text, "probe-", 6))
				printf("h %lu %s\n", cookie, text);
		}
	}
	printf("done\n");
}

static int next_line(char *line)
{
	if (!fgets(line, LINE, stdin))
		return 0;
	line[strcspn(line, "\n")] = 0;
	return 1;
}

static void sequence(void)
{
	char line[LINE];
	int pair[2], one;
	struct event first = {};

	setpgid(0, 0);
	alarm(60);
	for (int i = 0; i < SLOTS; i++)
		slots[i] = -1;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair))
		exit(1);
	if (!fork()) {
		close(pair[0]);
		help(pair[1]);
	}
	close(pair[1]);
	helper = pair[0];
	one = socket(AF_INET, SOCK_DGRAM, 0);
	note(&first, 0, 0, one);
	close(one);
	printf("ready %lu\n", first.netns);
	while (next_line(line) && strcmp(line, "end")) {
		if (*line == 'c' && count < CALLS) {
			strcpy(calls[count].line, line);
			calls[count].index = count;
			split(&calls[count++]);
		} else if (!strcmp(line, "go")) {
			go();
		} else if (!strcmp(line, "drain")) {
			drain();
		}
	}
	exit(0);
}

int main(void)
{
	char line[LINE];
	pid_t child;

	/* Both are read and written by turns with the child: nothing may be left in a buffer. */
	setvbuf(stdout, 0, _IOLBF, 0);
	events = mmap(0, CALLS * sizeof(*events), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	addresses = low_page();
	prctl(PR_SET_CHILD_SUBREAPER, 1);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	while (next_line(line)) {
		if (strcmp(line, "begin"))
			continue;
		child = fork();
		if (!child)
			sequence();
		setpgid(child, child);
		waitpid(child, 0, 0);
		kill(-child, SIGKILL);
		while (waitpid(-1, 0, 0) > 0)
			;
		printf("ended\n");
	}
	return 0;
}
