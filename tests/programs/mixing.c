/* One thread sends to the peer of its datagram socket, while another one connects that socket to two peers in turns: the
 * kernel reads a peer's address, port and source one after the other, without the socket's lock.
 *
 * mixing ADDRESS PORT OTHER_ADDRESS OTHER_PORT SECONDS LEVEL TYPE SIZE VALUE COUNT [alone]
 *
 * OTHER_ADDRESS "-": none, a disconnect. Each datagram has so many control messages, which take the kernel time. "alone":
 * it disconnects after each connect, too. */
#include <arpa/inet.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

struct peer {
	struct sockaddr_storage address;
	socklen_t size;
};

static int fd, alone;
static struct peer peers[2];

static void parse(struct peer *peer, const char *text, int port)
{
	struct sockaddr_in *four = (void *)&peer->address;
	struct sockaddr_in6 *six = (void *)&peer->address;

	if (*text == '-') {
		peer->address.ss_family = AF_UNSPEC;
		peer->size = sizeof(peer->address);
	} else if (strchr(text, ':')) {
		six->sin6_family = AF_INET6;
		six->sin6_port = htons(port);
		inet_pton(AF_INET6, text, &six->sin6_addr);
		peer->size = sizeof(*six);
	} else {
		four->sin_family = AF_INET;
		four->sin_port = htons(port);
		inet_pton(AF_INET, text, &four->sin_addr);
		peer->size = sizeof(*four);
	}
}

static void *connects(void *unused)
{
	struct sockaddr nobody = { .sa_family = AF_UNSPEC };

	for (int i = 0;; i ^= 1) {
		connect(fd, (void *)&peers[i].address, peers[i].size);
		if (alone)
			connect(fd, &nobody, sizeof(nobody));
	}
	return unused;
}

int main(int argc, char **argv)
{
	int level = atoi(argv[6]), type = atoi(argv[7]), size = atoi(argv[8]), value = atoi(argv[9]), count = atoi(argv[10]);
	size_t space = CMSG_SPACE(size);
	char *control = calloc(count, space);
	struct iovec data = { "secret", 6 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control, .msg_controllen = count * space };
	time_t end = time(0) + atoi(argv[5]);
	pthread_t thread;
	long sent = 0;

	alone = argc > 11;
	parse(&peers[0], argv[1], atoi(argv[2]));
	parse(&peers[1], argv[3], atoi(argv[4]));
	for (int i = 0; i < count; i++) {
		struct cmsghdr *one = (void *)(control + i * space);

		one->cmsg_level = level;
		one->cmsg_type = type;
		one->cmsg_len = CMSG_LEN(size);
		memcpy(CMSG_DATA(one), &value, size);
	}
	fd = socket(peers[0].address.ss_family, SOCK_DGRAM, 0);
	if (connect(fd, (void *)&peers[0].address, peers[0].size) || pthread_create(&thread, 0, connects, 0))
		return 1;
	while (time(0) < end)
		for (int i = 0; i < 100; i++)
			sent += sendmsg(fd, &message, 0) == 6;
	printf("sent %ld\n", sent);
	return 0;
}
