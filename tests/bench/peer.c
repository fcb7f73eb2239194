/* The small programs that the benchmark measures with, in C so that their own cost stays below the kernel's.
 *
 *   peer serve PORT                     echoes what each connection sends, one connection after the other
 *   peer pingpong ADDR PORT SECONDS     sends 64 bytes, waits for them, again and again
 *   peer connect ADDR PORT COUNT        socket, connect, close, again and again
 *   peer udp-serve PORT                 sends each datagram back to where it came from
 *   peer udp-pingpong ADDR PORT SECONDS a datagram of 64 bytes there and back, again and again
 *   peer udp-packets ADDR PORT SECONDS  the same with 32 under way at a time
 *
 * The clients print one line of JSON: the median and the mean of a round in microseconds, and how many there were. With
 * several datagrams under way a round is the time from one answer to the next. A datagram that has no answer after 0.2 s
 * is lost, and sent again.
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
#define MAX_SAMPLES 4000000

static float *samples;
static size_t sample_count;

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

static void keep(double us)
{
	if (sample_count < MAX_SAMPLES)
		samples[sample_count++] = us;
}

static int by_value(const void *a, const void *b)
{
	float x = *(const float *)a, y = *(const float *)b;
	return (x > y) - (x < y);
}

static void print_samples(void)
{
	if (!sample_count) {
		fprintf(stderr, "no samples\n");
		exit(1);
	}
	double sum = 0;
	for (size_t i = 0; i < sample_count; i++)
		sum += samples[i];
	qsort(samples, sample_count, sizeof(*samples), by_value);
	printf("{\"median_us\": %.3f, \"mean_us\": %.3f, \"count\": %zu}\n", samples[sample_count / 2],
	       sum / sample_count, sample_count);
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
	end = now_us() + seconds * 1e6;
	while ((start = now_us()) < end) {
		round_trip(fd);
		keep(now_us() - start);
	}
}

static void connect_and_close(const struct sockaddr_in *to, int count)
{
	for (int i = -WARM_UP; i < count; i++) {
		double start = now_us();

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
	double before, now, start = now_us(), end = start + seconds * 1e6;

	send_datagrams(fd, under_way);
	for (before = start; before < end; before = now) {
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

int main(int argc, char **argv)
{
	samples = malloc(MAX_SAMPLES * sizeof(*samples));
	if (!samples)
		die("malloc");
	if (argc == 3 && !strcmp(argv[1], "serve")) {
		serve(argv[2]);
	} else if (argc == 5 && !strcmp(argv[1], "pingpong")) {
		struct sockaddr_in to = address(argv[2], argv[3]);
		pingpong(&to, atof(argv[4]));
	} else if (argc == 5 && !strcmp(argv[1], "connect")) {
		struct sockaddr_in to = address(argv[2], argv[3]);
		connect_and_close(&to, atoi(argv[4]));
	} else if (argc == 3 && !strcmp(argv[1], "udp-serve")) {
		serve_datagrams(argv[2]);
	} else if (argc == 5 && (!strcmp(argv[1], "udp-pingpong") || !strcmp(argv[1], "udp-packets"))) {
		struct sockaddr_in to = address(argv[2], argv[3]);
		exchange_datagrams(&to, atof(argv[4]), !strcmp(argv[1], "udp-packets") ? UNDER_WAY : 1);
	} else {
		fprintf(stderr, "usage: peer serve|udp-serve PORT | pingpong|udp-pingpong|udp-packets ADDR PORT SECONDS | "
			"connect ADDR PORT COUNT\n");
		return 2;
	}
	print_samples();
	return 0;
}
