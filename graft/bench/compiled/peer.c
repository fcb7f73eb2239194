/* The small programs that the benchmark measures with, in C so that their own cost stays below the kernel's.
 *
 *   peer serve PORT                        echoes what each connection sends, one connection after the other
 *   peer pingpong ADDR PORT SECONDS        sends 64 bytes, waits for them, again and again
 *   peer accept ADDR PORT SECONDS          the same with a connection for each: connect, 64 bytes there and back, close
 *   peer connect ADDR PORT COUNT           socket, connect, close, again and again
 *   peer udp-serve PORT                    sends each datagram back to where it came from
 *   peer udp-pingpong ADDR PORT SECONDS    a datagram of 64 bytes there and back, again and again
 *   peer udp-packets ADDR PORT SECONDS     the same with 32 under way at a time
 *   peer histogram                         reads microseconds, a number a line: what a client would print of them
 *
 * The clients print one line of JSON: how many rounds there were, and in microseconds their mean and percentiles, all
 * of the time, and (with a cgroup's file cpu.stat as one more argument) the CPU time of that cgroup meanwhile. With
 * several datagrams under way a round is the time from one answer to the next. A datagram that has no answer after 0.2 s
 * is lost, and sent again.
 *
 * Each round is counted in a bucket of a histogram, 256 for each power of two of nanoseconds, and a percentile is
 * interpolated in its bucket: it is at most 1/256 away from the exact one.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE 64
#define WARM_UP 200
#define UNDER_WAY 32
#define LOST_AFTER_US 200000
#define STEPS_LOG 8
#define STEPS (1 << STEPS_LOG) /* buckets for each power of two */
#define OCTAVES 40             /* of nanoseconds: up to some minutes */

static unsigned long long buckets[OCTAVES * STEPS], rounds;
static double sum_us;
static const char *cpu_stat;
static double cpu_before, started_at;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static double now_us(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

/* Values below STEPS have a bucket each; above, a bucket is 1/STEPS of the power of two below it. */
static size_t bucket_of(unsigned long long ns)
{
	int shift;
	size_t bucket;

	if (ns < STEPS)
		return ns;
	shift = 63 - __builtin_clzll(ns) - STEPS_LOG;
	bucket = (size_t)(shift + 1) * STEPS + ((ns >> shift) - STEPS);
	return bucket < OCTAVES * STEPS ? bucket : OCTAVES * STEPS - 1;
}

static double lower_end(size_t bucket)
{
	if (bucket < STEPS)
		return bucket;
	return (double)(STEPS + bucket % STEPS) * (double)(1ULL << (bucket / STEPS - 1));
}

static void keep(double us)
{
	buckets[bucket_of(us * 1e3 + 0.5)]++;
	sum_us += us;
	rounds++;
}

static double percentile_us(double share)
{
	double wanted = share * rounds, below = 0;

	for (size_t i = 0; i < OCTAVES * STEPS; i++) {
		if (buckets[i] && below + buckets[i] >= wanted) {
			double low = lower_end(i), high = lower_end(i + 1);

			return (low + (high - low) * (wanted - below) / buckets[i]) / 1e3;
		}
		below += buckets[i];
	}
	return 0;
}

/* CPU time of the whole cgroup so far, in microseconds (cgroup-v2.rst, cpu.stat). */
static double cpu_us(void)
{
	unsigned long long usage;
	FILE *file = fopen(cpu_stat, "r");

	if (!file)
		die(cpu_stat);
	if (fscanf(file, "usage_usec %llu", &usage) != 1) {
		fprintf(stderr, "%s: no usage_usec\n", cpu_stat);
		exit(1);
	}
	fclose(file);
	return usage;
}

static void begin(void)
{
	if (cpu_stat)
		cpu_before = cpu_us();
	started_at = now_us();
}

static void print_rounds(void)
{
	double elapsed = now_us() - started_at;

	if (!rounds) {
		fprintf(stderr, "no rounds\n");
		exit(1);
	}
	printf("{\"count\": %llu, \"seconds\": %.6f, \"mean_us\": %.3f, \"p50_us\": %.3f, \"p90_us\": %.3f, "
	       "\"p99_us\": %.3f, \"p99.9_us\": %.3f",
	       rounds, elapsed / 1e6, sum_us / rounds, percentile_us(0.5), percentile_us(0.9), percentile_us(0.99),
	       percentile_us(0.999));
	if (cpu_stat)
		printf(", \"cpu_us\": %.0f", cpu_us() - cpu_before);
	printf("}\n");
}

static struct sockaddr_in address(const char *host, const char *port)
{
	struct sockaddr_in sin = { .sin_family = AF_INET, .sin_port = htons(atoi(port)) };

	if (inet_pton(AF_INET, host, &sin.sin_addr) != 1) {
		fprintf(stderr, "%s: not an IPv4 address\n", host);
		exit(2);
	}
	return sin;
}

static void no_delay(int fd)
{
	int one = 1;

	if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)))
		die("TCP_NODELAY");
}

static int connected(const struct sockaddr_in *to)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		die("socket");
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		die("connect");
	return fd;
}

static void serve(const char *port)
{
	struct sockaddr_in any = address("0.0.0.0", port);
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	char buffer[4096];

	if (listener < 0)
		die("socket");
	setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(listener, (struct sockaddr *)&any, sizeof(any)))
		die("bind");
	if (listen(listener, 4096))
		die("listen");
	for (;;) {
		int fd = accept(listener, NULL, NULL);
		ssize_t n;

		if (fd < 0)
			die("accept");
		no_delay(fd);
		while ((n = read(fd, buffer, sizeof(buffer))) > 0)
			if (write(fd, buffer, n) != n)
				break;
		close(fd);
	}
}

static void round_trip(int fd)
{
	char message[MESSAGE] = { 0 };
	size_t got = 0;

	if (write(fd, message, MESSAGE) != MESSAGE)
		die("write");
	while (got < MESSAGE) {
		ssize_t n = read(fd, message + got, MESSAGE - got);

		if (n <= 0)
			die("read");
		got += n;
	}
}

static void pingpong(const struct sockaddr_in *to, double seconds)
{
	int fd = connected(to);
	double end, start;

	no_delay(fd);
	for (int i = 0; i < WARM_UP; i++)
		round_trip(fd);
	begin();
	end = started_at + seconds * 1e6;
	while ((start = now_us()) < end) {
		round_trip(fd);
		keep(now_us() - start);
	}
}

static void accept_each(const struct sockaddr_in *to, double seconds)
{
	double end, start;

	begin();
	end = started_at + seconds * 1e6;
	while ((start = now_us()) < end) {
		int fd = connected(to);

		no_delay(fd);
		round_trip(fd);
		close(fd);
		keep(now_us() - start);
	}
}

static void connect_and_close(const struct sockaddr_in *to, int count)
{
	for (int i = -WARM_UP; i < count; i++) {
		double start;

		if (i == 0)
			begin();
		start = now_us();
		close(connected(to));
		if (i >= 0)
			keep(now_us() - start);
	}
}

static void serve_datagrams(const char *port)
{
	struct sockaddr_in any = address("0.0.0.0", port), from;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	char buffer[4096];

	if (fd < 0)
		die("socket");
	if (bind(fd, (struct sockaddr *)&any, sizeof(any)))
		die("bind");
	for (;;) {
		socklen_t size = sizeof(from);
		ssize_t n = recvfrom(fd, buffer, sizeof(buffer), 0, (struct sockaddr *)&from, &size);

		if (n < 0)
			die("recvfrom");
		sendto(fd, buffer, n, 0, (struct sockaddr *)&from, size);
	}
}

static int datagram_socket(const struct sockaddr_in *to)
{
	struct timeval wait = { .tv_usec = LOST_AFTER_US };
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof(wait));
	if (connect(fd, (const struct sockaddr *)to, sizeof(*to)))
		die("connect");
	return fd;
}

static void send_datagrams(int fd, int count)
{
	char message[MESSAGE] = { 0 };

	for (int i = 0; i < count; i++)
		if (send(fd, message, MESSAGE, 0) < 0 && errno != ECONNREFUSED)
			die("send");
}

static void exchange_datagrams(const struct sockaddr_in *to, double seconds, int under_way)
{
	int fd = datagram_socket(to), lost = 0;
	char answer[MESSAGE];
	double before, now, end;

	begin();
	end = started_at + seconds * 1e6;
	send_datagrams(fd, under_way);
	for (before = started_at; before < end; before = now) {
		ssize_t n = recv(fd, answer, sizeof(answer), 0);

		now = now_us();
		if (n < 0 && errno != EAGAIN && errno != ECONNREFUSED)
			die("recv");
		if (n < 0 && ++lost > 20) {
			fprintf(stderr, "nothing answers\n");
			exit(1);
		}
		if (n >= 0)
			keep(now - before);
		send_datagrams(fd, n < 0 ? under_way : 1);
	}
}

static void read_rounds(void)
{
	double us;

	begin();
	while (scanf("%lf", &us) == 1)
		keep(us);
}

static int usage(void)
{
	fprintf(stderr, "usage: peer serve|udp-serve PORT | pingpong|accept|udp-pingpong|udp-packets ADDR PORT SECONDS "
		"[CPU.STAT] | connect ADDR PORT COUNT [CPU.STAT] | histogram\n");
	return 2;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";

	if (argc == 3 && !strcmp(what, "serve")) {
		serve(argv[2]);
	} else if (argc == 3 && !strcmp(what, "udp-serve")) {
		serve_datagrams(argv[2]);
	} else if (argc == 2 && !strcmp(what, "histogram")) {
		read_rounds();
	} else if (argc == 5 || argc == 6) {
		struct sockaddr_in to = address(argv[2], argv[3]);

		cpu_stat = argv[5];
		if (!strcmp(what, "pingpong"))
			pingpong(&to, atof(argv[4]));
		else if (!strcmp(what, "accept"))
			accept_each(&to, atof(argv[4]));
		else if (!strcmp(what, "connect"))
			connect_and_close(&to, atoi(argv[4]));
		else if (!strcmp(what, "udp-pingpong") || !strcmp(what, "udp-packets"))
			exchange_datagrams(&to, atof(argv[4]), !strcmp(what, "udp-packets") ? UNDER_WAY : 1);
		else
			return usage();
	} else {
		return usage();
	}
	print_rounds();
	return 0;
}
