/* An instance that computes nothing: it answers every request at once, so that what is measured is the gateway.
 *
 *   gateway_mock PORT
 *
 * One thread and epoll. A body with "stream":true is answered by 16 server-sent events, each a chunk and a packet of its
 * own; everything else by one JSON object with a usage. HTTP/1.1 with Content-Length only: the load generators and the
 * gateways measured send nothing else.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { CONNECTIONS_MAX = 4096, REQUEST_BYTES_MAX = 1 << 17, EVENTS = 16 };

struct connection { char *bytes; size_t held; };

static struct connection connections[CONNECTIONS_MAX];
static const char USAGE[] =
    "\"usage\":{\"prompt_tokens\":100,\"completion_tokens\":16,\"total_tokens\":116,"
    "\"prompt_tokens_details\":{\"cached_tokens\":64}}";
static char plain[1024], head[256], event[512], last[512];
static int plain_length, head_length, event_length, last_length;

static int chunk(char *into, size_t size, const char *text) {
  return snprintf(into, size, "%zx\r\n%s\r\n", strlen(text), text);
}

static void make_answers(void) {
  char body[512], text[512];
  int length = snprintf(body, sizeof body,
      "{\"id\":\"x\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\"status\":\"ok\",\"model_path\":\"m\","
      "\"data\":[{\"id\":\"m\",\"object\":\"model\"}],\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
      "\"content\":\"hello\"},\"text\":\"hello\",\"finish_reason\":\"stop\"}],%s}", USAGE);
  plain_length = snprintf(plain, sizeof plain,
      "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s", length, body);
  head_length = snprintf(head, sizeof head,
      "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n");
  event_length = chunk(event, sizeof event,
      "data: {\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"m\",\"choices\":[{\"index\":0,"
      "\"delta\":{\"content\":\" word\"},\"text\":\" word\",\"finish_reason\":null}]}\n\n");
  snprintf(text, sizeof text, "data: {\"id\":\"x\",\"object\":\"chat.completion.chunk\",\"choices\":[],%s}\n\n", USAGE);
  last_length = chunk(last, sizeof last, text);
  last_length += chunk(last + last_length, sizeof last - (size_t)last_length, "data: [DONE]\n\n");
  last_length += snprintf(last + last_length, sizeof last - (size_t)last_length, "0\r\n\r\n");
}

static int put(int fd, const char *bytes, int length) {
  return send(fd, bytes, (size_t)length, MSG_NOSIGNAL) == length ? 0 : -1;
}

static int answer(int fd, const char *body, size_t length) {
  if (memmem(body, length, "\"stream\":true", 13) == NULL && memmem(body, length, "\"stream\": true", 14) == NULL)
    return put(fd, plain, plain_length);
  if (put(fd, head, head_length) < 0) return -1;
  for (int at = 1; at < EVENTS; at++)
    if (put(fd, event, event_length) < 0) return -1;
  return put(fd, last, last_length);
}

/* Every whole request of what is held. Returns -1 when the connection is over. */
static int serve(int fd, struct connection *connection) {
  for (;;) {
    char *end = memmem(connection->bytes, connection->held, "\r\n\r\n", 4);
    if (end == NULL) return connection->held < REQUEST_BYTES_MAX ? 0 : -1;
    size_t from = (size_t)(end + 4 - connection->bytes), length = 0;
    *end = 0;
    char *found = strcasestr(connection->bytes, "\r\ncontent-length:");
    *end = '\r';
    if (found != NULL) length = strtoul(found + 17, NULL, 10);
    if (from + length > REQUEST_BYTES_MAX) return -1;
    if (connection->held < from + length) return 0;
    if (answer(fd, connection->bytes + from, length) < 0) return -1;
    connection->held -= from + length;
    memmove(connection->bytes, connection->bytes + from + length, connection->held);
  }
}

static void forget(int fd) {
  close(fd);
  connections[fd].held = 0;
}

static void hear(int fd) {
  struct connection *connection = &connections[fd];
  if (connection->bytes == NULL) connection->bytes = malloc(REQUEST_BYTES_MAX + 1);
  ssize_t got = recv(fd, connection->bytes + connection->held, REQUEST_BYTES_MAX - connection->held, 0);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) return;
  if (got <= 0) { forget(fd); return; }
  connection->held += (size_t)got;
  if (serve(fd, connection) < 0) forget(fd);
}

int main(int count, char **words) {
  if (count != 2) { fprintf(stderr, "usage: gateway_mock PORT\n"); return 2; }
  make_answers();
  int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0), poll = epoll_create1(0);
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1]))};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 1024) < 0) {
    perror("gateway_mock");
    return 1;
  }
  struct epoll_event wanted = {.events = EPOLLIN, .data.fd = listener}, ready[256];
  epoll_ctl(poll, EPOLL_CTL_ADD, listener, &wanted);
  puts("ready");
  fflush(stdout);
  for (;;) {
    int found = epoll_wait(poll, ready, 256, -1);
    for (int at = 0; at < found; at++) {
      int fd = ready[at].data.fd;
      if (fd != listener) { hear(fd); continue; }
      int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
      if (client < 0) continue;
      if (client >= CONNECTIONS_MAX) { close(client); continue; }
      setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
      struct epoll_event event = {.events = EPOLLIN, .data.fd = client};
      epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
    }
  }
}
