package fs

import (
	"bytes"
	"encoding/json"
	"sync"
	"time"

	"github.com/imgfs/imgfs/images"
)

// maxEvents is how many bytes of .imgfs/events are kept. When they are more, the
// older half goes.
const maxEvents = 1 << 20

// maxReason is how much of an error is kept: some of it is a registry's.
const maxReason = 4096

func reasonOf(err error) string {
	reason := err.Error()
	return reason[:min(len(reason), maxReason)]
}

// eventLog is the file .imgfs/events: what happened to the images since the
// mount was made, a JSON object on each line. It only grows, so that `tail -f`
// follows it, but for the moment in which its older half is dropped.
type eventLog struct {
	mu   sync.Mutex
	data []byte
	time time.Time // of the last change
}

// eventEntry is a line of it.
type eventEntry struct {
	Time  time.Time `json:"time"`
	Op    string    `json:"op"`             // pull, update, untag, tag, move, exchange, delete, dangling, drop, restart, error
	Name  string    `json:"name,omitempty"` // of the image, as docker writes it
	ID    string    `json:"id,omitempty"`   // of the image or the layer
	Error string    `json:"error,omitempty"`
}

// add appends an event. name may be zero, id may be empty.
func (l *eventLog) add(op string, name images.Name, id string) {
	l.append(eventEntry{Op: op, Name: eventName(name), ID: id})
}

// fail appends the failure of what a name stands for.
func (l *eventLog) fail(name string, err error) {
	l.append(eventEntry{Op: "error", Name: name, Error: reasonOf(err)})
}

// restarted records that this server follows another, which has ended so.
func (l *eventLog) restarted(end string) { l.append(eventEntry{Op: "restart", Error: end}) }

func eventName(n images.Name) string {
	if n == (images.Name{}) {
		return ""
	}
	return n.String()
}

func (l *eventLog) append(e eventEntry) {
	e.Time = time.Now().UTC()
	line, err := json.Marshal(e)
	if err != nil {
		return // strings and a time
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !e.Time.After(l.time) {
		e.Time = l.time.Add(1) // the kernel must see another mtime
	}
	l.time = e.Time
	if len(l.data)+len(line)+1 > maxEvents {
		half := l.data[len(l.data)/2:]
		// A new slice: who reads the old one goes on.
		l.data = append(make([]byte, 0, maxEvents), half[bytes.IndexByte(half, '\n')+1:]...)
	}
	l.data = append(append(l.data, line...), '\n')
}

// contents returns the file and its time. The caller does not change it.
func (l *eventLog) contents() ([]byte, time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.data[:len(l.data):len(l.data)], l.time
}
