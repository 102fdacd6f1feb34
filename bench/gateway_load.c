/* Asks a gateway as fast as it answers, on connections that are kept.
 *
 *   gateway_load PORT CONNECTIONS SECONDS BODY_BYTES STREAM SEED
 *
 * Two hundred conversations in turn: the first half of each body is the same for all, the second differs. Prints how
 * many requests were answered, and how many of the answers were not 200 and whole. SEED makes conversations of a run
 * its own, so that no router knows them from an earlier one; within a run each comes many times.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BODIES = 200, ANSWER_BYTES_MAX = 1 << 16, CONNECTIONS_MAX = 256, ANSWERS_MIN = 20 };

struct connection { int fd, streamed; long left; size_t held; char bytes[ANSWER_BYTES_MAX + 1]; };

static struct connection connections[CONNECTIONS_MAX];
static char *requests[BODIES];
static size_t lengths[BODIES];
static long answered, bad;

static double now(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return (double)at.tv_sec + (double)at.tv_nsec / 1e9;
}

static void fill(char *into, size_t size, const char *words) {
  for (size_t at = 0, length = strlen(words); at < size; at++) into[at] = words[at % length];
  into[size] = 0;
}

static void make_requests(int port, size_t size, int stream, const char *seed) {
  char *shared = malloc(size + 1), *own = malloc(size + 1), words[96];
  fill(shared, size / 2, "you are a helpful assistant, and this is what all prompts begin with; ");
  for (int at = 0; at < BODIES; at++) {
    snprintf(words, sizeof words, "conversation %s %d says: ", seed, at);
    fill(own, size / 2, words);
    char *body;
    int length = asprintf(&body,
        "{\"model\":\"m\",\"stream\":%s,\"messages\":[{\"role\":\"system\",\"content\":\"%s\"},"
        "{\"role\":\"user\",\"content\":\"%s\"}]}", stream ? "true" : "false", shared, own);
    lengths[at] = (size_t)asprintf(&requests[at],
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
        "Content-Length: %d\r\n\r\n%s", port, length, body);
    free(body);
  }
}

static void ask(struct connection *connection) {
  static int turn;
  int at = turn++ % BODIES;
  size_t sent = 0;
  connection->held = 0;
  connection->left = -1;
  while (sent < lengths[at]) {
    ssize_t put = send(connection->fd, requests[at] + sent, lengths[at] - sent, MSG_NOSIGNAL);
    if (put < 0) { perror("gateway_load: send"); exit(1); }
    sent += (size_t)put;
  }
}

/* True once the answer is whole. The answers are the mock's, so their framing is known. */
static int whole(struct connection *connection) {
  if (connection->left < 0) {
    connection->bytes[connection->held] = 0;
    char *end = strstr(connection->bytes, "\r\n\r\n");
    if (end == NULL) return 0;
    *end = 0;
    char *length = strcasestr(connection->bytes, "\r\ncontent-length:");
    connection->streamed = length == NULL;
    connection->left = length == NULL ? 0 : strtol(length + 17, NULL, 10) + (end + 4 - connection->bytes);
    bad += strncmp(connection->bytes, "HTTP/1.1 200", 12) != 0;
    *end = '\r';
  }
  if (!connection->streamed) return (long)connection->held >= connection->left;
  return connection->held > 7 && memcmp(connection->bytes + connection->held - 7, "\r\n0\r\n\r\n", 7) == 0;
}

static void hear(struct connection *connection) {
  ssize_t got = recv(connection->fd, connection->bytes + connection->held, ANSWER_BYTES_MAX - connection->held, 0);
  if (got <= 0) { fprintf(stderr, "gateway_load: a connection ended\n"); exit(1); }
  connection->held += (size_t)got;
  if (whole(connection)) {
    answered++;
    ask(connection);
  }
}

int main(int count, char **words) {
  if (count != 7) { fprintf(stderr, "usage: gateway_load PORT CONNECTIONS SECONDS BODY_BYTES STREAM SEED\n"); return 2; }
  int port = atoi(words[1]), wanted = atoi(words[2]), poll = epoll_create1(0), one = 1;
  if (wanted < 1 || wanted > CONNECTIONS_MAX) return 2;
  make_requests(port, (size_t)atol(words[4]), atoi(words[5]), words[6]);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (int at = 0; at < wanted; at++) {
    struct connection *connection = &connections[at];
    connection->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(connection->fd, (struct sockaddr *)&address, sizeof address) < 0) { perror("gateway_load"); return 1; }
    setsockopt(connection->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    epoll_ctl(poll, EPOLL_CTL_ADD, connection->fd, &event);
  }
  double until = now() + atof(words[3]);
  for (int at = 0; at < wanted; at++) ask(&connections[at]);
  struct epoll_event ready[64];
  while (now() < until || (answered < ANSWERS_MIN && now() < until + 20)) {
    int found = epoll_wait(poll, ready, 64, 100);
    for (int at = 0; at < found; at++) hear(ready[at].data.ptr);
  }
  printf("%ld %ld\n", answered, bad);
  return 0;
}
