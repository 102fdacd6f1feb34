/* The least a gateway can do on this machine: receive, send, receive, send, and decide nothing.
 *
 *   passing PORT INSTANCE_PORT...
 *
 * One thread and epoll. A request is read until its Content-Length, sent on a kept connection to the instances in turn,
 * and every piece of the answer goes back as it comes. It checks nothing, and knows the framing of the bench's mock.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { BYTES_MAX = 1 << 17, INSTANCES_MAX = 16 };

/* One connection: a client's, or one of ours to an instance. `other` is the one it is answered from, or answers. */
struct side { int fd, instance; struct side *other, *next; size_t held; long whole; char bytes[BYTES_MAX + 1]; };

static struct side *idle[INSTANCES_MAX];
static int ports[INSTANCES_MAX], instances, epoll;

static struct sockaddr_in at(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

static struct side *hold(int fd, int instance) {
  int one = 1;
  struct side *side = calloc(1, sizeof *side);
  side->fd = fd, side->instance = instance, side->whole = -1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = side};
  epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &wanted);
  return side;
}

/* A connection to the instance whose turn it is; NULL where it does not listen. */
static struct side *taken(void) {
  static int turn;
  int instance = turn++ % instances;
  struct side *side = idle[instance];
  if (side != NULL) { idle[instance] = side->next; return side; }
  struct sockaddr_in address = at(ports[instance]);
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  return connect(fd, (struct sockaddr *)&address, sizeof address) == 0 ? hold(fd, instance) : NULL;
}

/* True once what is held is a whole message: as long as it says, or a stream with its last chunk. */
static int whole(struct side *side) {
  if (side->whole < 0) {
    side->bytes[side->held] = 0;
    char *end = strstr(side->bytes, "\r\n\r\n");
    if (end == NULL) return 0;
    *end = 0;
    char *length = strcasestr(side->bytes, "\r\ncontent-length:");
    side->whole = length == NULL ? 0 : end + 4 - side->bytes + strtol(length + 17, NULL, 10);
    *end = '\r';
  }
  if (side->whole > 0) return (long)side->held >= side->whole;
  return side->held > 7 && memcmp(side->bytes + side->held - 7, "\r\n0\r\n\r\n", 7) == 0;
}

static void put(struct side *side, const char *bytes, size_t size) {
  for (ssize_t sent; size > 0; bytes += sent, size -= (size_t)sent)
    if ((sent = send(side->fd, bytes, size, MSG_NOSIGNAL)) <= 0) return;
}

static void ask(struct side *client) {
  struct side *link = taken();
  if (link == NULL) { shutdown(client->fd, SHUT_RDWR); return; }
  link->other = client, client->other = link;
  put(link, client->bytes, client->held);
  client->held = 0, client->whole = -1;
}

/* A connection ended. The other one, if it was in the middle of something, ends with it. */
static void over(struct side *side) {
  if (side->other != NULL) { side->other->other = NULL; shutdown(side->other->fd, SHUT_RDWR); }
  for (struct side **each = &idle[side->instance < 0 ? 0 : side->instance]; *each != NULL; each = &(*each)->next)
    if (*each == side) { *each = side->next; break; }
  close(side->fd);
  free(side);
}

static void hear(struct side *side) {
  ssize_t got = recv(side->fd, side->bytes + side->held, BYTES_MAX - side->held, 0);
  if (got <= 0) { over(side); return; }
  if (side->instance >= 0 && side->other != NULL) put(side->other, side->bytes + side->held, (size_t)got);
  side->held += (size_t)got;
  if (!whole(side)) return;
  if (side->instance < 0) { ask(side); return; }
  if (side->other != NULL) side->other->other = NULL;
  side->other = NULL, side->next = idle[side->instance], side->held = 0, side->whole = -1;
  idle[side->instance] = side;
}

int main(int count, char **words) {
  for (int word = 2; word < count && instances < INSTANCES_MAX; word++) ports[instances++] = atoi(words[word]);
  if (!instances || (epoll = epoll_create1(0)) < 0) return 2;
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address = at(atoi(words[1]));
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1024) < 0) return 1;
  struct epoll_event wanted = {.events = EPOLLIN, .data.ptr = NULL}, ready[64];
  epoll_ctl(epoll, EPOLL_CTL_ADD, listener, &wanted);
  for (;;) {
    int found = epoll_wait(epoll, ready, 64, -1);
    for (int each = 0; each < found; each++) {
      if (ready[each].data.ptr != NULL) { hear(ready[each].data.ptr); continue; }
      int fd = accept(listener, NULL, NULL);
      if (fd >= 0) hold(fd, -1);
    }
  }
}
