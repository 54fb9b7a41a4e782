package fs

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxErrors is how many errors .imgfs/errors shows.
const maxErrors = 1000

// errorLog keeps the last errors, the reasons behind the errnos that callers
// saw. The same error of the same object is one entry, with a count.
type errorLog struct {
	mu    sync.Mutex
	list  []errorEntry
	added int64
}

type errorEntry struct {
	Time   time.Time `json:"time"` // of the last one
	Name   string    `json:"name"`
	Op     string    `json:"op"`
	Errno  string    `json:"errno"`
	Reason string    `json:"reason"`
	Count  int       `json:"count"`
}

// add keeps an error. It returns false when the same one was the object's last:
// then it need not be logged again.
func (l *errorLog) add(name, op string, errno syscall.Errno, err error) (fresh bool) {
	e := errorEntry{Time: time.Now().UTC(), Name: name, Op: op, Errno: unix.ErrnoName(errno), Reason: reasonOf(err), Count: 1}
	l.mu.Lock()
	defer l.mu.Unlock()
	fresh = true
	l.added++
	for i := range l.list {
		old := l.list[i]
		if old.Name == e.Name && old.Op == e.Op && old.Errno == e.Errno && old.Reason == e.Reason {
			e.Count += old.Count
			l.list = append(l.list[:i], l.list[i+1:]...)
			fresh = false
			break
		}
	}
	if len(l.list) >= maxErrors {
		l.list = l.list[1:]
	}
	l.list = append(l.list, e)
	return fresh
}

// count is how many errors there were, repetitions included.
func (l *errorLog) count() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.added
}

// latest is the reason of an object's last error; ok is false when it had none.
func (l *errorLog) latest(name string) (reason string, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, e := range slices.Backward(l.list) {
		if e.Name == name {
			return e.Reason, true
		}
	}
	return "", false
}

func (l *errorLog) entries() []errorEntry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]errorEntry{}, l.list...)
}

func (l *errorLog) text(b *bytes.Buffer) error {
	for _, e := range l.entries() {
		fmt.Fprintf(b, "%s %s %s %s: %s", e.Time.Format(time.RFC3339), e.Errno, e.Op, oneLine(e.Name), oneLine(e.Reason))
		if e.Count > 1 {
			fmt.Fprintf(b, " (%d times)", e.Count)
		}
		b.WriteByte('\n')
	}
	return nil
}

// json writes one object a line.
func (l *errorLog) json(b *bytes.Buffer) error {
	enc := json.NewEncoder(b)
	for _, e := range l.entries() {
		if err := enc.Encode(e); err != nil {
			return err
		}
	}
	return nil
}
