/* Resolves a name with the C library's own resolver, and prints its first IPv4 address. Built with musl, whose resolver
 * binds one unconnected socket to no address and no port, and sends to every server from it. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>

int main(int count, char **words)
{
	struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found;
	int error = count == 2 ? getaddrinfo(words[1], 0, &hints, &found) : EAI_NONAME;

	if (error) {
		fprintf(stderr, "%s\n", gai_strerror(error));
		return 1;
	}
	puts(inet_ntoa(((struct sockaddr_in *)found->ai_addr)->sin_addr));
	return 0;
}
