#include "rts/doorbell.hpp"

#include <poll.h>
#include <unistd.h>

namespace rts::eventfd {

void signal(int fd) noexcept {
  const std::uint64_t one = 1;
  // Refused only by a counter that is full, and that wakes as well.
  [[maybe_unused]] const ssize_t written = ::write(fd, &one, sizeof one);
}

void drain(int fd) noexcept {
  std::uint64_t rings = 0;
  [[maybe_unused]] const ssize_t read = ::read(fd, &rings, sizeof rings);  // empty: nothing to take
}

bool wait(int fd, int timeout_ms) noexcept {
  pollfd sleeping_on{fd, POLLIN, 0};
  return ::poll(&sleeping_on, 1, timeout_ms) > 0;
}

}  // namespace rts::eventfd
