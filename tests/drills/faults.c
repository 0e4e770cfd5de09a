// Preloaded into a process under test. Watches the calls that change files below a root. Either copies the root before
// each of them, which is what a kill at that moment would leave behind; or lets them fail with an errno from the n-th on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX], copies[PATH_MAX];
static atomic_int count, armed, first, failure;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

// Copies go to `into`/0, `into`/1, ...
void faults_copy(const char *below, const char *into) {
  snprintf(root, sizeof root, "%s", below);
  snprintf(copies, sizeof copies, "%s", into);
  atomic_store(&count, 0);
  atomic_store(&armed, 1);
}

void faults_fail(const char *below, int from, int with_errno) {
  snprintf(root, sizeof root, "%s", below);
  atomic_store(&first, from);
  atomic_store(&failure, with_errno);
  atomic_store(&armed, 1);
}

int faults_stop(void) {
  atomic_store(&armed, 0);
  return atomic_load(&count);
}

__attribute__((constructor)) static void arm_from_environment(void) {
  const char *below = getenv("FAULTS_ROOT"), *at = getenv("FAULTS_AT"), *with = getenv("FAULTS_ERRNO");
  if (below && at && with) faults_fail(below, atoi(at), atoi(with));
}

static int inside(const char *path) { return root[0] && path && strstr(path, root) == path; }

static int inside_at(int dir, const char *path) {
  if (!root[0] || !path) return 0;
  if (path[0] == '/' || dir == AT_FDCWD) {
    if (path[0] == '/') return inside(path);
    char cwd[PATH_MAX];
    return getcwd(cwd, sizeof cwd) && inside(cwd);
  }
  char link[64], name[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t n = readlink(link, name, sizeof name - 1);
  if (n <= 0) return 0;
  name[n] = 0;
  return inside(name);
}

static int inside_fd(int fd) { return root[0] && inside_at(fd, "."); }

// Returns an errno where the call is to fail.
static int strike(int is_inside) {
  if (!is_inside || !atomic_load(&armed)) return 0;
  if (atomic_load(&failure)) return atomic_fetch_add(&count, 1) >= atomic_load(&first) ? atomic_load(&failure) : 0;
  pthread_mutex_lock(&one_at_a_time);
  // A call that another thread has been let go on with may delete a file while it is copied: then the copy is made again.
  char command[4 * PATH_MAX];
  snprintf(command, sizeof command, "to='%s/%d'; for i in 1 2 3 4 5; do cp -a '%s' \"$to\" && exit 0; rm -rf \"$to\"; done; exit 1",
           copies, atomic_fetch_add(&count, 1), root);
  if (system(command)) abort();
  pthread_mutex_unlock(&one_at_a_time);
  return 0;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define STRIKE(where) do { int e = strike(where); if (e) { errno = e; return -1; } } while (0)
#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC))

int open(const char *path, int flags, ...) {
  REAL(open);
  va_list a; va_start(a, flags); mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(a, mode_t) : 0; va_end(a);
  if (WRITES(flags)) STRIKE(inside_at(AT_FDCWD, path));
  return real(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  REAL(open64);
  va_list a; va_start(a, flags); mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(a, mode_t) : 0; va_end(a);
  if (WRITES(flags)) STRIKE(inside_at(AT_FDCWD, path));
  return real(path, flags, mode);
}
int openat(int dir, const char *path, int flags, ...) {
  REAL(openat);
  va_list a; va_start(a, flags); mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(a, mode_t) : 0; va_end(a);
  if (WRITES(flags)) STRIKE(inside_at(dir, path));
  return real(dir, path, flags, mode);
}
int openat64(int dir, const char *path, int flags, ...) {
  REAL(openat64);
  va_list a; va_start(a, flags); mode_t mode = (flags & (O_CREAT | O_TMPFILE)) ? va_arg(a, mode_t) : 0; va_end(a);
  if (WRITES(flags)) STRIKE(inside_at(dir, path));
  return real(dir, path, flags, mode);
}
ssize_t write(int fd, const void *data, size_t n) { REAL(write); STRIKE(inside_fd(fd)); return real(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { REAL(pwrite); STRIKE(inside_fd(fd)); return real(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { REAL(pwrite64); STRIKE(inside_fd(fd)); return real(fd, data, n, at); }
ssize_t writev(int fd, const struct iovec *v, int n) { REAL(writev); STRIKE(inside_fd(fd)); return real(fd, v, n); }
int ftruncate(int fd, off_t n) { REAL(ftruncate); STRIKE(inside_fd(fd)); return real(fd, n); }
int ftruncate64(int fd, off64_t n) { REAL(ftruncate64); STRIKE(inside_fd(fd)); return real(fd, n); }
int fsync(int fd) { REAL(fsync); STRIKE(inside_fd(fd)); return real(fd); }
int fdatasync(int fd) { REAL(fdatasync); STRIKE(inside_fd(fd)); return real(fd); }
int rename(const char *a, const char *b) { REAL(rename); STRIKE(inside(a) || inside(b)); return real(a, b); }
int renameat(int c, const char *a, int d, const char *b) { REAL(renameat); STRIKE(inside_at(c, a) || inside_at(d, b)); return real(c, a, d, b); }
int renameat2(int c, const char *a, int d, const char *b, unsigned f) { REAL(renameat2); STRIKE(inside_at(c, a) || inside_at(d, b)); return real(c, a, d, b, f); }
int link(const char *a, const char *b) { REAL(link); STRIKE(inside(b)); return real(a, b); }
int unlink(const char *a) { REAL(unlink); STRIKE(inside(a)); return real(a); }
int unlinkat(int d, const char *a, int f) { REAL(unlinkat); STRIKE(inside_at(d, a)); return real(d, a, f); }
int rmdir(const char *a) { REAL(rmdir); STRIKE(inside(a)); return real(a); }
int mkdir(const char *a, mode_t m) { REAL(mkdir); STRIKE(inside(a)); return real(a, m); }
int mkdirat(int d, const char *a, mode_t m) { REAL(mkdirat); STRIKE(inside_at(d, a)); return real(d, a, m); }
